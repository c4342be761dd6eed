"""Prefill in Triton."""
