"""A simulated engine under load: texts, machines, arrivals, and the runtime's own policy."""
