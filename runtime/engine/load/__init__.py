"""Chooses modes by load, from a table of costs.

There is one plan for all rows of an engine.
"""
