"""checkpoint -> bundle: stages, the weight pack, and the command line. Nothing heavy is imported here."""
