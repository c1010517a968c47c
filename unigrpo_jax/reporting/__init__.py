"""The HTML page about a run: what it reads, its charts, its sections."""
