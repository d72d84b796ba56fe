"""What a choice costs, measured."""
