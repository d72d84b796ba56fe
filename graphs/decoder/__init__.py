"""The decoder: trunk, attention, positions, the graph of each role, and tracing."""
