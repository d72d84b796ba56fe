"""Keeps files of a build: the cache, its keys, staged folders."""
