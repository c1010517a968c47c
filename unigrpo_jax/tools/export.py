"""Export of a run's checkpoint as an official folder, on one host and its CPU."""

from __future__ import annotations

import pathlib
import sys

import jax
import ml_collections

from unigrpo_jax import errors
from unigrpo_jax.models import adapters
from unigrpo_jax.recipe import sections
from unigrpo_jax.runtime import checkpoints, folders, state


def export(
  workdir: pathlib.Path, target: pathlib.Path, *, step: int | None = None,
  dtype: str | None = None, overwrite: bool = False, adapter: bool = False,
  init_from: str | None = None,
) -> None:
  """Exports the policy of a run's checkpoint, or its moving average where the run keeps one.

  Args:
    workdir: of the run.
    target: official folder to write.
    step: of the checkpoint; None: the newest.
    dtype: of the weights; None: `export_dtype` of the run's config, or float32 for adapters.
    overwrite: whether an existing folder of the same kind is replaced.
    adapter: write only the adapters, as a PEFT folder.
    init_from: where the folder that the run started from is now; None: where it was.

  Raises:
    InputError: there is no such checkpoint, or it cannot be read or written.
  """
  # On the CPU: a pod's host would wait for the other hosts, and the run may be using the chips.
  jax.config.update("jax_platforms", "cpu")
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    raise errors.InputError(f"{workdir}: holds no checkpoints; give the --workdir of a run")
  # Unfinished checkpoints are not removed: the run may be saving one.
  saved = checkpoints.TrainCheckpoints(folder, keep=None, clean=False)
  if not saved.steps or step not in (None, *saved.steps):
    raise errors.InputError(
      f"{workdir}: no checkpoint {'yet' if step is None else step}; it has {saved.steps}"
    )
  step, record = saved.newest(saved.record, only=step, move=False)
  config = ml_collections.ConfigDict(record["config"])
  # The devices of this machine, however many the run has.
  config.mesh.update(dict(data=1, fsdp=0, tensor=1))
  config.attention = "plain"
  # Few keys of the config are used, so that runs of older versions can be exported too.
  if init_from is not None:
    config.init_from = init_from
  with errors.at("give --init_from, the folder that the run began with"):
    network = state.open_network(sections.network(config))
    if record.get("init_from") not in (None, network.folder.fingerprint()):
      raise errors.InputError(f"{network.folder.path} is another model")
  optimizer = sections.optimizer(config, config.steps)
  if adapter and network.model.lora is None:
    raise errors.InputError(
      f"{workdir}: the run trains no adapters (config.lora.rank=0); leave out --adapter"
    )
  if adapter and (others := sorted(optimizer.trained - {"und", "gen"})):
    print(
      f"note: the run also trains {', '.join(others)}, which adapters do not hold; only an export "
      "without --adapter has them", file=sys.stderr,
    )
  folders.check_target(
    network.folder.path, target, overwrite=overwrite,
    is_replaceable=adapters.is_folder if adapter else folders.is_folder,
  )
  ema = optimizer.ema_decay is not None
  abstract = state.layout(network, optimizer.make(), ema=ema, reference=False).abstract
  # Only these parameters are loaded; the whole state is several times as large.
  wanted = {"ema": abstract.ema} if ema else {"params": abstract.params}
  with errors.at(f"--step={step}"):
    [params] = saved.load(step, wanted, partial=True).values()
  if adapter:
    state.export_adapter(
      network, params, target, dtype or "float32", base=config.init_from, overwrite=overwrite
    )
  else:
    state.export(network, params, str(target), dtype or config.export_dtype)
