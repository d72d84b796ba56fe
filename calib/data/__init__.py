"""Prompts that jobs read: drawn, split and checked."""
