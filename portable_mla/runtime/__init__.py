"""What torch and Triton need: launches, streams, operators, packages."""
