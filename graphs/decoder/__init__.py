"""Defines the decoder: trunk, attention, positions, graphs, tracing."""
