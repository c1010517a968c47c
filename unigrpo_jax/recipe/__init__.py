"""From configs to frozen dataclasses, and from those to the parts of a run."""
