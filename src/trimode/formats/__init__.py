"""Reads and writes files, and declares their schemas.

Nothing is imported here.
"""
