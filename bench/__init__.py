"""Measurements; run them from the repository's root."""
