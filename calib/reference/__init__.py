"""Runs the model in PyTorch: eagerly, from mapped files, or rounded as in a bundle."""
