"""Learned rewards: a BAGEL that is asked about pictures, differentiable in the pixels; and CLIP."""
