"""A reward model: the probability that a BAGEL answers "yes" when asked if a picture fits a prompt.

  reward_model, params = open_folder("tiny_reward_model")
  questions = reward_model.questions(["two red kites"])
  rewards = reward_model.score(params, pixels, questions)      # [B], differentiable in pixels

The sequence is the one of BAGEL's answers: [vision_start] ViT tokens [vision_end], [im_start]
question [im_end], [im_start]. The reward is read from the logits at the last token. The picture
comes first, so that the question can attend to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import files
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import requests
from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import prompts as prompts_lib
from unigrpo_jax.iconworld import riddles
from unigrpo_jax.models import bagel, layers
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.reward_models import readout as readout_lib
from unigrpo_jax.reward_models import resize as resize_lib
from unigrpo_jax.runtime import checksums, folders, sharding, state

FILE = "reward.json"
TINY = "tiny_reward_model"  # The embedded one, wherever a reward model's folder is expected.
TINY_FOLDER = folders.TINY_FOLDER.with_name(TINY)
# Keys of FILE that scores depend on, with the types of their values. It has "metrics" besides.
_KINDS = {
  "question": str, "yes_id": int, "no_id": int, "tau": (int, float), "readout": str,
  "vit_max": int, "prompt_form": str, "clip": str, "checksums": dict,
}
QUESTION = 'Does this image match the prompt "{prompt}"? Answer yes or no.'
TINY_QUESTION = "does it show {prompt}? yes or no"
YES, NO = "yes", "no"
CLIPS = ("hard", "none")
PROMPT_FORMS = ("prompt", "plain")
BUCKET = 16  # Questions are padded to a multiple of this many tokens.


@struct.dataclass
class Questions:
  """B questions, as token ids that follow a picture."""

  ids: jax.Array  # [im_start] question [im_end] [im_start], padded: [B, T] int32
  lengths: jax.Array  # without the padding, [B] int32


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
  """The static part of a reward model; its parameters are an argument of `score`.

  Attributes:
    model: the network.
    tokenizer: of the network.
    yes_id, no_id: first tokens of the two answers; see `answer_ids`.
    question: what is asked about a picture; contains "{prompt}" once.
    prompt_form: what takes the place of {prompt}: "prompt", what the user wrote, or "plain", a
      plain description; see `words`.
    readout: one of `readout.READOUTS`.
    tau: temperature of the two logits.
    vit_max: longest side of the ViT's input, in pixels.
    clip: "hard": pixels beyond [-1, 1] are clipped and have no gradient; "none": no clipping.
    checksum: of the folder that it was opened from; "": none.

  Raises:
    InputError: an attribute is impossible.
  """

  model: bagel.Bagel
  tokenizer: tokenizer_lib.Tokenizer
  yes_id: int
  no_id: int
  question: str = QUESTION
  prompt_form: str = "prompt"
  readout: str = "two_token"
  tau: float = 1.0
  vit_max: int = 980
  clip: str = "hard"
  checksum: str = ""

  def __post_init__(self):
    errors.choose("readout", self.readout, readout_lib.READOUTS)
    errors.choose("prompt_form", self.prompt_form, PROMPT_FORMS)
    errors.choose("clip", self.clip, CLIPS)
    errors.require("tau", self.tau, above=0)
    check_question(self.question)
    vit_rule(self.model.config, self.vit_max)

  def words(self, prompt: str, metadata: Mapping[str, Any] | None = None) -> str:
    """The words that stand for {prompt} in the question.

    They are the prompt itself; but with `prompt_form` "plain" and IconWorld's metadata a plain
    description of what the metadata asks for.
    """
    if self.prompt_form == "plain" and metadata and metadata.get("include"):
      if rules.problem(metadata) is None and all(
        entry["class"] in riddles.PLURALS for entry in metadata["include"]
      ):
        return prompts_lib.plain(metadata)
    return prompt

  def questions(self, prompts: Sequence[str], room: int = 0) -> Questions:
    """The questions about B prompts (results of `words`), as NumPy arrays.

    They are padded to the longest of them, or to `room` tokens where that is more.

    Raises:
      InputError: a prompt is empty, contains the quotation marks that surround it in the question,
        or is too long for the network. It is never cut, which would make it another question.
    """
    rows = [self._encode(prompt) for prompt in prompts]
    ids, mask = requests.pad_rows(rows, BUCKET, room)
    return Questions(ids, mask.sum(axis=1).astype(np.int32))

  def _encode(self, prompt: str) -> list[int]:
    t = self.tokenizer
    ids = [*requests.wrap(t, asked(self.question, prompt)), t.im_start]
    room = self.model.config.llm.max_positions - 1  # The picture takes one.
    if len(ids) > room:
      raise errors.InputError(
        f"prompt {prompt[:60]!r} makes a question of {len(ids)} tokens, the model has room for "
        f"{room} (max_position_embeddings); shorten it"
      )
    return ids

  def score(self, params: Any, pixels: jax.Array, questions: Questions) -> jax.Array:
    """How well pictures show what they are asked about: [B] float32, larger is better.

    A pure function that works with `jax.jit`, `jax.vmap` and `jax.checkpoint`. It is differentiable
    in the pixels only.

    Args:
      params: of the network, {"embed_tokens": ..., "layers": ..., ...}.
      pixels: [B, H, W, 3] in [-1, 1], but not clipped; of any size.
      questions: one about each picture.
    """
    return readout_lib.read(
      self.logits(params, pixels, questions), yes_id=self.yes_id, no_id=self.no_id, tau=self.tau,
      readout=self.readout,
    )

  def logits(self, params: Any, pixels: jax.Array, questions: Questions) -> jax.Array:
    """Logits of the answer's first token, [B, V] float32; arguments as in `score`."""
    params = {"params": jax.lax.stop_gradient(params)}
    with jax.named_scope("reward_model"):
      batch = self._sequence(self.patches(pixels), questions)
      hidden, _ = self.model.apply(params, batch, method="packed")
      return self.model.apply(params, hidden[:, 0], method="logits")

  def patches(self, pixels: jax.Array) -> types.Patches:
    """The ViT's input for `pixels` of `score`: clipped, resized by BAGEL's two rules, patchified.
    """
    config, rule = self.model.config, vit_rule(self.model.config, self.vit_max)
    bounds = (-1.0, 1.0) if self.clip == "hard" else None
    pixels = pixels.astype(layers.at_least_float32(pixels.dtype))
    if bounds is not None:
      pixels = jnp.clip(pixels, *bounds)
    for each in (config.vae_image, rule):
      height, width = pixels.shape[-3:-1]
      width, height = images_lib.resized_size(width, height, each)
      pixels = resize_lib.resize(pixels, height, width, bounds)
    ids = images_lib.position_ids(
      height, width, config.vit.patch_size, config.vit_max_patches_per_side, config.interpolate_pos
    )
    cut = jax.vmap(lambda image: images_lib.patchify(image, config.vit.patch_size))
    shape = (pixels.shape[0], len(ids))
    return types.Patches(cut(pixels), jnp.broadcast_to(ids, shape), jnp.ones(shape, bool))

  def _sequence(self, patches: types.Patches, questions: Questions) -> types.PackedBatch:
    """Sequences of a picture and its question, with one label each, at the last start token.

    They equal those of `packing.pack`, but the arrays may be traced by jax.
    """
    rows, count = patches.mask.shape
    length = questions.ids.shape[1]
    start, end = self.model.image_markers
    image = jnp.broadcast_to(jnp.array([start, *[end] * (count + 1)]), (rows, count + 2))
    # The picture has one position and sees itself whole; the text after it is causal.
    place = jnp.arange(count + 2 + length)
    is_image = place < count + 2
    position = jnp.where(is_image, 0, place - (count + 1))
    reach = jnp.where(is_image, count + 1, place)
    real = is_image | (place < count + 2 + questions.lengths[:, None])  # [B, T]
    across = lambda values: jnp.broadcast_to(values, (rows, values.shape[-1])).astype(jnp.int32)
    return types.PackedBatch(
      und_ids=jnp.concatenate([image, questions.ids], axis=1).astype(jnp.int32),
      und_position=across(position), und_order=jnp.where(real, place, types.UNSEEN),
      und_reach=jnp.where(real, reach, types.BLIND),
      label_slot=(count + 1 + questions.lengths)[:, None],
      label_ids=jnp.zeros((rows, 1), jnp.int32), label_weight=jnp.ones((rows, 1)),
      vit=patches, vit_row=jnp.arange(rows), vit_slot=across(1 + jnp.arange(count)),
    )


def stack(questions: Sequence[Questions]) -> Questions:
  """Concatenates several `Questions` of NumPy arrays along their rows, padding their tokens."""
  length = max(one.ids.shape[1] for one in questions)
  pad = lambda ids: np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
  return Questions(
    np.concatenate([pad(one.ids) for one in questions]),
    np.concatenate([one.lengths for one in questions]),
  )


def check_question(question: str) -> None:
  """Raises InputError unless a question contains "{prompt}" exactly once."""
  if question.count("{prompt}") != 1:
    raise errors.InputError(
      f"question={errors.shown(question)} must hold {{prompt}} once, where the prompt goes"
    )


def asked(question: str, prompt: str) -> str:
  """The question about a prompt.

  Raises:
    InputError: the prompt is empty, or holds the quotation marks that the question has around it.
  """
  if not prompt.strip():
    raise errors.InputError("a prompt is empty; the reward model needs to know what to look for")
  before, after = question.split("{prompt}")
  if before.endswith('"') and after.startswith('"') and '"' in prompt:
    raise errors.InputError(
      f"prompt {errors.shown(prompt)} holds quotation marks, and the model's question puts it "
      "between such; write ' instead"
    )
  return f"{before}{prompt}{after}"


def vit_rule(config: config_lib.BagelConfig, vit_max: int) -> config_lib.ImageSizeRule:
  """How a picture is resized for the ViT, with a longest side of `vit_max` pixels.

  Raises:
    InputError: `vit_max` is not a multiple of the ViT's patch size.
  """
  rule = config.vit_image
  errors.require("vit_max", vit_max, integer=True, low=rule.stride)
  if vit_max % rule.stride:
    raise errors.InputError(
      f"vit_max={vit_max} is not a multiple of {rule.stride}, the ViT's patch; "
      f"try {vit_max // rule.stride * rule.stride}"
    )
  return dataclasses.replace(rule, max_size=vit_max, min_size=min(rule.min_size, vit_max))


def answer_ids(tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, int]:
  """The first tokens of "yes" and of "no".

  Raises:
    InputError: they are equal, or one is special or not a part of the word; then their
      probabilities would say nothing about the answer.
  """
  special = {getattr(tokenizer, name) for name in tokenizer_lib.SPECIAL_TOKENS}
  firsts = []
  for word in (YES, NO):
    ids = tokenizer.encode(word)
    if not ids or ids[0] in special or tokenizer.decode(ids) != word:
      raise errors.InputError(
        f"{tokenizer.source}: its tokenizer makes {ids} of {word!r}, which begins with a token "
        "that is not of the word; a reward model needs one that adds none"
      )
    firsts.append(ids[0])
  if firsts[0] == firsts[1]:
    raise errors.InputError(
      f"{tokenizer.source}: {YES!r} and {NO!r} begin with the same token {firsts[0]}; a model "
      "needs a tokenizer that tells them apart by the first"
    )
  return firsts[0], firsts[1]


def open_folder(
  folder: pathlib.Path | str, mesh: jax.sharding.Mesh | None = None, *, dtype: Any = None
) -> tuple[RewardModel, Any]:
  """Opens a reward model's folder; returns the model and its parameters.

  Args:
    folder: an official BAGEL folder with a reward.json; "tiny_reward_model" is the embedded one.
    mesh: devices for the parameters; None: the first device of this host.
    dtype: of network and parameters; None: float32 on CPU, bfloat16 elsewhere.

  Raises:
    InputError: it is no such folder, or one of its files does not match reward.json.
  """
  path = _path(folder)
  record = read_record(path)
  if mesh is None:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  network = state.open_for_sampling(path, dtype=dtype, mesh=mesh)
  if answer_ids(network.tokenizer) != (record["yes_id"], record["no_id"]):
    raise errors.InputError(
      f"{path / FILE}: yes_id={record['yes_id']} and no_id={record['no_id']}, but the tokenizer "
      f"beside it begins the two answers with {answer_ids(network.tokenizer)}; the two belong to "
      "different models"
    )
  fields = {name: record[name] for name in _KINDS if name != "checksums"}
  with errors.at(str(path / FILE)):
    reward_model = RewardModel(
      network.model.for_gradients(), network.tokenizer, checksum=checksum_of(record), **fields
    )
  return reward_model, load_params(network)


def load_params(network: state.Network) -> Any:
  """The parameters of a reward model's network, as `RewardModel.score` takes them.

  Without those that only draw, half of BAGEL-7B-MoT's.
  """
  return network.folder.load_params(
    dtype=network.model.dtype, parts=("bagel",), without=bagel.DRAWING,
    shardings=state.param_shardings(network.model, network.mesh, ("bagel",)),
  )["bagel"]


def read_record(folder: pathlib.Path) -> dict[str, Any]:
  """Reads a folder's reward.json, and checks the folder's files against its checksums.

  Raises:
    InputError: it is missing, one of its keys is missing or has a wrong type, or a file differs.
  """
  if folder == TINY_FOLDER and not folder.is_dir():
    raise errors.InputError(
      f"{TINY} is missing from this installation; make a reward model with python -m "
      "unigrpo_jax.reward_model and give its folder"
    )
  if not (folder / FILE).is_file():
    raise errors.InputError(
      f"{folder}: has no {FILE}; give a folder made by python -m unigrpo_jax.reward_model, or "
      f"{TINY}"
    )
  record = config_lib.read_json(folder / FILE)
  for key, kind in _KINDS.items():
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
      raise errors.InputError(
        f"{folder / FILE}: {key}={errors.shown(value)} is missing or of a wrong kind; copy the "
        "folder again"
      )
  for name, expected in record["checksums"].items():
    path = folder / name
    if not path.is_file() or list(checksums.of(path)) != expected:
      raise errors.InputError(
        f"{path}: is not the file that {FILE} was written for; copy the folder again"
      )
  return record


def fingerprint(folder: pathlib.Path | str) -> str:
  """`checksum_of` a folder's reward model; raises as `read_record`."""
  return checksum_of(read_record(_path(folder)))


def _path(folder: pathlib.Path | str) -> pathlib.Path:
  """The path of a folder, or of the embedded one for TINY."""
  return TINY_FOLDER if folder == TINY else files.path(folder)


def checksum_of(record: Mapping[str, Any]) -> str:
  """A hash (16 hexadecimal digits) of what scores depend on: weights, question, temperature, ..."""
  text = json.dumps({key: record[key] for key in _KINDS}, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
