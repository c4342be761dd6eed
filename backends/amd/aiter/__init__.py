"""AITER's decode kernels."""
