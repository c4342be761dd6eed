"""FlashInfer's MLA kernels."""
