"""Text: prompts, chat templates, and tokens to characters."""
