"""Decode over a paged latent cache."""
