"""Prefill in Gluon for Hopper."""
