"""Beside other runtimes: the same shapes, machine and threads, in turns."""
