"""The paged latent cache: pages, writing, slots."""
