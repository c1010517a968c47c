"""Trajectories as static scripts of segments: sampled, replayed and packed."""
