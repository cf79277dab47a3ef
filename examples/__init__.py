"""Programs that show the package at work; run them from the repository's root."""
