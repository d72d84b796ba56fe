"""Measurements on this machine: forwards, and how often drafts are accepted."""
