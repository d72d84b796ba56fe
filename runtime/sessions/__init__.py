"""Sessions: the loaded graphs, by library."""
