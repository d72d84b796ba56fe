"""Opens a bundle and maps its weights."""
