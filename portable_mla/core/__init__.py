"""What a call is: architectures, shapes, formats and checks. No kernel, no device memory."""
