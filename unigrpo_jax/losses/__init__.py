"""Objectives: pure functions of arrays. They never see a model, a mesh or a config."""
