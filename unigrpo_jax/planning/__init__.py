"""What a run needs of its chips, read from its compiled programs; `python -m unigrpo_jax.plan`."""
