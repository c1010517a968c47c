"""The smallest BAGEL that trains: the embedded one cut to two layers."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np

from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import folders


def make(place: pathlib.Path) -> pathlib.Path:
  """Makes `place`/bagel, an official folder whose programs compile sooner than those of five."""
  tiny = folders.open_folder(folders.TINY)
  params = tiny.load_params(dtype=np.float32)
  params["bagel"]["layers"] = jax.tree.map(lambda a: a[:2], params["bagel"]["layers"])
  draft = place / "draft"
  draft.mkdir()
  for path in folders.other_files(tiny):
    (draft / path.name).write_bytes(path.read_bytes())
  sizes = json.loads((draft / config_lib.LLM_FILE).read_text())
  (draft / config_lib.LLM_FILE).write_text(json.dumps(sizes | {"num_hidden_layers": 2}))
  folder = folders.ModelFolder(draft, "official", draft, config_lib.read_config(draft))
  folders.write_official(place / "bagel", folder, params, dtype=np.float32)
  return place / "bagel"
