"""Algorithms: what each learns of an experience, and the one update that all of them share."""
