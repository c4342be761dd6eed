"""AMD's kernels on an emulated GPU."""
