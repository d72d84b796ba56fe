"""Measurements. Each script prints a short table and writes raw JSON with machine and command to
``benchmarks/results/``.
"""
