"""Without a GPU or Triton."""
