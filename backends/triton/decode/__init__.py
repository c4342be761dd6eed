"""Decode in Triton."""
