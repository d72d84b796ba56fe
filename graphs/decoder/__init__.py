"""Defines the decoder: trunk, attention, positions, role graphs, tracing."""
