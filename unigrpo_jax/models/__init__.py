"""Flax Linen modules of BAGEL; pure through `apply`."""
