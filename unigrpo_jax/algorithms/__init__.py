"""Algorithms: how each turns episodes into a loss, and the one update that all of them share."""
