"""Launches, compiled code and the interpreter."""
