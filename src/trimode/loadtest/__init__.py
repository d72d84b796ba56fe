"""Puts load on an OpenAI-compatible server and measures its answers."""
