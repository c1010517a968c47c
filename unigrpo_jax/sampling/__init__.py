"""Samplers: token decoding and flow integration. They receive functions, never a model."""
