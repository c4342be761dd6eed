"""Triton kernels that serve both vendors, and their launcher."""
