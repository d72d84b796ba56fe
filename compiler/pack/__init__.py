"""Lays out and writes the weight pack."""
