"""The host's part of a launch: layouts, buffers, configurations, plans."""
