"""Several sequences side by side."""
