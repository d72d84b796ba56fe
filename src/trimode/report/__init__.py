"""Turns records into pages and pictures."""
