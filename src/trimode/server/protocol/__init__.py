"""Declares what requests and answers look like."""
