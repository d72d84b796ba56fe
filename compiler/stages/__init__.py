"""Holds the stages of a build; :mod:`trimode.compiler.pipeline` orders them."""
