"""Writes a checkpoint of a training run as an official folder: `python -m unigrpo_jax.export -h`.

Works while the run goes on: what is read is the newest complete checkpoint, or the one of --step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import sys

from unigrpo_jax import errors


def export(
  workdir: pathlib.Path, target: pathlib.Path, step: int | None, dtype: str | None,
  overwrite: bool = False,
):
  """Exports the policy of a run, or its moving average where it keeps one.

  Args:
    workdir: of the run.
    target: official folder to write.
    step: of the checkpoint; None: the newest.
    dtype: of the weights; None: what the run's config says.
    overwrite: whether a model folder that is there is replaced.

  Raises:
    InputError: there is no such checkpoint, or it cannot be read or written.
  """
  import ml_collections

  from unigrpo_jax.runtime import folders, runs

  if not (workdir / "checkpoints").is_dir():
    raise errors.InputError(f"{workdir}: holds no checkpoints; give the --workdir of a run")
  saved = runs.read_checkpoints(workdir)
  if step is None:
    step = saved.latest
  if step is None or step not in saved.steps:
    raise errors.InputError(
      f"{workdir}: no checkpoint {'yet' if step is None else step}; it has {saved.steps}"
    )
  config = ml_collections.ConfigDict(saved.record(step)["config"])
  # The devices that are here, however many the run has.
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 0, 1
  config.attention = "plain"
  network = runs.open_network(config)
  folders.check_target(network.folder.path, target, overwrite=overwrite)
  ema = config.ema_decay > 0
  abstract, _ = runs.state_layout(network, runs.make_optimizer(config), ema=ema, reference=False)
  # Only what is written: the whole state is many times that.
  averaged = {"ema": abstract.ema} if ema else {"params": abstract.params}
  [params] = saved.load(step, averaged, partial=True).values()
  runs.export(network, params, str(target), dtype or config.export_dtype)


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.export", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdir", type=pathlib.Path, help="of the run")
  parser.add_argument("out", type=pathlib.Path, help="official folder to write")
  parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
  parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
  parser.add_argument("--overwrite", action="store_true", help="replace a model folder")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  import jax

  # A host of a pod would wait for the others, and the chips may be the run's.
  jax.config.update("jax_platforms", "cpu")
  export(args.workdir, args.out, args.step, args.dtype, args.overwrite)


if __name__ == "__main__":
  errors.report(main)
