"""Runs the model in PyTorch: eager, mapped, or rounded as bundles."""
