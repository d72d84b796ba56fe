"""Checks a caller's choices, and completes them from the bundle."""
