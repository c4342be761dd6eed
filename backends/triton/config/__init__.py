"""Launch configurations of the Triton kernels, by vendor."""
