"""Options of the commands, each spelled once."""
