"""Draws, splits and checks the prompts that jobs read."""
