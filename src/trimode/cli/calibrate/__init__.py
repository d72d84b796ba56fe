"""The commands of ``trimode calibrate``."""
