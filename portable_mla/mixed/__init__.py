"""Steps of decodes and prefills."""
