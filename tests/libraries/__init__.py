"""Adapters of other people's packages, against stand-ins."""
