"""The command line: one file a command. Nothing is imported here."""
