"""Holds the passes over graphs; :mod:`trimode.compiler.passes.recipes` orders them."""
