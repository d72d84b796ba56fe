"""Chooses the steps of mode ``auto`` from timings and earlier texts."""
