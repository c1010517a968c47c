"""How long XLA compiles."""

from __future__ import annotations

import jax


class CompileTimer:
  """Seconds that XLA compiled, while it is entered."""

  def __enter__(self) -> CompileTimer:
    self._seconds = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, name: str, seconds: float, **_) -> None:
    if name.endswith("backend_compile_duration"):
      self._seconds += seconds

  def read_and_reset(self) -> float:
    """Since the last call."""
    seconds, self._seconds = self._seconds, 0.0
    return seconds
