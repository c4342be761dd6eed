"""AMD's compiled kernels, executed on a CPU by tinygrad's instruction-level emulator."""
