"""Measures what a choice costs."""
