"""Integrations in engines."""
