"""The weight pack: how it is laid out, and how it is written."""
