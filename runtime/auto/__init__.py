"""Mode ``auto``: which step to take next, from timings and from what texts have shown."""
