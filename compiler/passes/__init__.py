"""Passes over graphs, one a file; :mod:`trimode.compiler.passes.recipes` has their order."""
