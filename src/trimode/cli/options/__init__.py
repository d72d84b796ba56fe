"""Spells each option of the commands once."""
