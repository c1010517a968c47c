"""Where compiled programs are kept, so that a run that goes on need not compile again."""

from __future__ import annotations

import pathlib
import warnings

import jax

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files
from unigrpo_jax.runtime import hosts


def use(default: pathlib.Path) -> None:
  """Keeps compiled programs in the folder that JAX was given, else in `default`.

  No run ends because its programs cannot be kept: where the folder cannot be written to, that is
  printed once, while JAX would warn of each program.
  """
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  folder = jax.config.jax_compilation_cache_dir or str(default)
  try:
    with errors.at(folder):
      with errors.storage(""):  # Else a host would remove the folder that another one probes.
        files.path(folder).mkdir(parents=True, exist_ok=True)
      atomic.probe(files.path(folder) / "probe")
  except errors.InputError as error:
    hosts.print_first(f"note: compiled programs are not kept: {error}")
    jax.config.update("jax_enable_compilation_cache", False)
    return
  jax.config.update("jax_compilation_cache_dir", folder)
