"""UniGRPO: joint text and image reinforcement learning for BAGEL, in JAX and Flax."""
