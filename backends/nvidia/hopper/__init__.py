"""Decode and prefill in Gluon for Hopper."""
