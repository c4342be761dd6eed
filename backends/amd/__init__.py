"""Backends and tile rules of AMD Instinct GPUs."""
