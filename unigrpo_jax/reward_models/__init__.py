"""Learned rewards, differentiable in the pixels: what asks a BAGEL about a picture."""
