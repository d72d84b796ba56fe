"""Calibrates and trains with data: scales, drafters, samplers, the demo checkpoint.

It also measures what quantization costs and how few forwards could do. Nothing is imported here.
"""
