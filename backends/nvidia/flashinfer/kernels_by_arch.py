"""Which of FlashInfer's kernels for paged MLA decode serve on which architecture."""

# FlashInfer's kernels for paged MLA decode, best first.
FLASHINFER_KERNELS = {
    "sm80": ("fa2",),
    "sm86": ("fa2",),
    "sm89": ("fa2",),
    "sm90": ("fa3", "fa2"),
    "sm100": ("trtllm-gen", "cutlass", "fa2"),
    "sm103": ("trtllm-gen", "cutlass", "fa2"),
    "sm120": ("xqa", "fa2"),
    "sm121": ("xqa", "fa2"),
}
