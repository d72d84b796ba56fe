"""Implements the commands of ``trimode calibrate``."""
