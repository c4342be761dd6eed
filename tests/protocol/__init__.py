"""Models of the Hopper kernels' barriers, tied to the kernels' source."""
