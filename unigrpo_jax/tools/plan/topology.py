"""Networks on TPU topologies that are only named, without any TPU."""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import topologies

from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import rl
from unigrpo_jax.runtime import folders, state
from unigrpo_jax.tools.plan import chips

INSTALL = 'install the TPU compiler, pip install "jax[tpu]"'


def devices(name: str) -> tuple[chips.Chip, list]:
  """(the chip, the devices) of a topology such as "v5p:4x4x4".

  Raises:
    InputError: the TPU compiler is not installed, or there is no such topology; `Unavailable` where
      another process has the compiler.
  """
  kind, _, shape = name.partition(":")
  if kind not in chips.CHIPS or not shape:
    raise errors.InputError(
      f"--topology={name!r}: expected {', '.join(chips.CHIPS)}, a colon and a shape, e.g. v5p:4x4x4"
    )
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except (RuntimeError, ImportError) as error:
    reason = " ".join(str(error).split())
    if "lockfile" in reason:
      raise errors.Unavailable(f"--topology={name}: {reason}") from None
    missing = "not installed" in reason or "libtpu" in reason
    raise errors.InputError(
      f"--topology={name}: {INSTALL} ({reason})" if missing else f"--topology={name}: {reason}"
    ) from None
  return chips.CHIPS[kind], list(topology.devices)


def open_network(
  spec: state.NetworkSpec, chip: chips.Chip, chip_devices: list
) -> state.Network:
  """The network of a spec, or BAGEL-7B-MoT, on the devices of a topology; without weights."""
  if spec.init_from:
    network = state.open_network(spec, chip_devices)
  else:
    folder = folders.ModelFolder(None, "official", None, config_lib.bagel_7b())
    network = state.build_network(spec, folder, stub_tokenizer(), chip_devices)
  return dataclasses.replace(network, device_memory=chip.hbm)


def stub_tokenizer() -> tokenizer_lib.Tokenizer:
  """A stub with BAGEL-7B-MoT's special ids; it knows only the length of the system prompt."""
  lengths = {tokenizer_lib.SYSTEM_PROMPT_GEN: 46}
  return tokenizer_lib.Tokenizer(
    None, im_start=151644, im_end=151645, vision_start=151652, vision_end=151653, size=151665,
    encode_text=lambda text: [0] * lengths.get(text, 1), decode_ids=lambda ids: "",
  )


def summary(spec: rl.Spec) -> list[str]:
  """Lines that describe an iteration of the run."""
  r, s, lora = spec.rollout, spec.rollout.settings, spec.network.lora
  text = f"{s.max_tokens} tokens of reasoning" if s.think else "no reasoning"
  method = f"LoRA of rank {lora.rank}" if lora else "full fine-tuning"
  return [
    f"{spec.prompts.per_step} prompts x {r.group_size} = {spec.trajectories} trajectories of "
    f"{r.height} x {r.width} pixels, {text}, {s.num_timesteps - 1} steps",
    f"{method}, {spec.update.epochs} epoch(s), microbatch {spec.update.microbatch}, "
    f"{r.prompts_at_once} prompts at once; jax {jax.__version__}",
  ]
