"""Serves a bundle over HTTP: OpenAI's interface, and what running it takes."""
