"""Backends and tile rules of NVIDIA GPUs."""
