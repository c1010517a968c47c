"""Compares this implementation with recorded reference outputs: `python -m tests.parity DIR`."""
