"""Predicts what a GPU will hold of a checkpoint before a build."""
