"""Modes by load: one plan for the rows of an engine, from a table of costs."""
