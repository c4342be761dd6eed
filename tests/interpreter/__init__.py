"""The kernels in Triton's interpreter, on any CPU: run with TRITON_INTERPRET=1, in a process of its own."""
