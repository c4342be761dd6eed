"""What every backend must keep to."""
