"""IconWorld: small scenes of icons, prompts about them, and an exact verifier. numpy, no jax."""
