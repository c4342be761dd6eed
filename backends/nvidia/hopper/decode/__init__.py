"""Decode in Gluon for Hopper."""
