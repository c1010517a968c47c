"""Text to token ids and back, from the files of a BAGEL folder; nothing is ever downloaded.

A released folder has the Qwen2.5 byte-level BPE. A folder of recorded reference outputs has a
character tokenizer instead, described by `toy_tokenizer` in its `bagel_config.json`. There is no
chat template: the caller puts `im_start` and `im_end` around a text's ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import re
import sys
import types
from typing import Any
import unicodedata

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib

# The system prompts that the released model was trained with, token for token: each first line ends
# in a space, which is part of id 715.
SYSTEM_PROMPT_GEN = (
  "You should first think about the planning process in the mind and then generate the image. \n"
  "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process "
  "here </think> image here"
)
SYSTEM_PROMPT_VLM = (
  "You should first think about the reasoning process in the mind and then provide the user with "
  "the answer. \n"
  "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process "
  "here </think> answer here"
)

# What a tokenizer is read from, see `load`; those that are there.
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
SPECIAL_TOKENS = {
  name: f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end")
}


def without_tags(reasoning: str | None) -> str:
  """A reasoning for people to read; "" for none."""
  return (reasoning or "").replace("<think>", "").replace("</think>", "").strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded tokenizer."""

  source: pathlib.Path  # the folder it came from, for messages
  im_start: int  # ids of the special tokens
  im_end: int
  vision_start: int
  vision_end: int
  size: int  # one more than the largest id; an embedding may have more rows, untrained ones
  encode_text: Callable[[str], list[int]] = dataclasses.field(repr=False)  # of NFC text
  decode_ids: Callable[[Sequence[int]], str] = dataclasses.field(repr=False)

  def encode(self, text: str) -> list[int]:
    """Ids of `text` in NFC; the name of a special token becomes it, as in the official code.

    Raises:
      InputError: the text cannot be encoded; the message quotes the character.
    """
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise errors.InputError(
        f"text {text[:60]!r} holds {text[error.start]!r}, which is not Unicode text; remove it"
      ) from None
    return self.encode_text(unicodedata.normalize("NFC", text))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of all `ids`, special tokens by name; ids that split a character give U+FFFD."""
    return self.decode_ids([int(i) for i in ids])

  def check_fits(self, vocab_size: int) -> None:
    """Raises InputError where an id has no row in an embedding of `vocab_size` rows."""
    if self.size > vocab_size:
      raise errors.InputError(
        f"{self.source}: the tokenizer gives ids up to {self.size - 1}, but "
        f"{config_lib.LLM_FILE} has vocab_size={vocab_size}; the two belong to different models"
      )


def load(folder: pathlib.Path | str) -> Tokenizer:
  """Loads the tokenizer of a BAGEL folder.

  Looks for `tokenizer.json`, then `vocab.json` with `merges.txt` (and a `tokenizer_config.json`
  that lists the added tokens), then `toy_tokenizer` in `bagel_config.json`; raises InputError if
  none of them is there and loads with all special tokens.
  """
  folder = pathlib.Path(folder)
  bagel_path = folder / config_lib.BAGEL_FILE
  if (folder / "tokenizer.json").is_file():
    tokenizer = _load_bpe(folder, "PreTrainedTokenizerFast", "tokenizer.json")
  elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    tokenizer = _load_bpe(folder, "Qwen2Tokenizer", "vocab.json with merges.txt")
  elif bagel_path.is_file() and "toy_tokenizer" in (bagel := config_lib.read_json(bagel_path)):
    tokenizer = _load_characters(folder, bagel["toy_tokenizer"])
  else:
    raise errors.InputError(
      f"{folder}: no tokenizer; looked for tokenizer.json, vocab.json with merges.txt, and "
      f"toy_tokenizer in {config_lib.BAGEL_FILE}"
    )
  special = {field: getattr(tokenizer, field) for field in SPECIAL_TOKENS}
  if len(set(special.values())) < len(special):
    raise errors.InputError(f"{folder}: special tokens share an id: {special}; give each its own")
  return tokenizer


def import_transformers() -> types.ModuleType:
  """transformers, slow to import, without its notice that PyTorch is not installed."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  return transformers


def _load_bpe(folder: pathlib.Path, class_name: str, files: str) -> Tokenizer:
  """Through transformers, by a class that is named here: no folder chooses which code runs."""
  try:
    backend_class = getattr(import_transformers(), class_name)
    # A limit of the folder would only be warned of, and may be of any kind.
    backend = backend_class.from_pretrained(
      folder, local_files_only=True, model_max_length=sys.maxsize
    )
    vocabulary = backend.get_vocab()
  # The parser is a Rust extension that raises bare Exception.
  except Exception as error:
    raise errors.InputError(
      f"{folder}: {files} does not load as a tokenizer ({error}); copy it again from the released "
      "model"
    ) from None

  def encode(text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False)

  def decode(ids: Sequence[int]) -> str:
    return backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  for name in SPECIAL_TOKENS.values():
    # vocab.json and merges.txt alone do not list the added tokens: transformers then answers every
    # unknown name with <|endoftext|>, and would read the name in a prompt as ordinary characters.
    if name not in vocabulary or encode(name) != [vocabulary[name]]:
      raise errors.InputError(
        f"{folder}: {files} does not define {name} as one token; add the released model's "
        "tokenizer.json, or its tokenizer_config.json, which list the added tokens"
      )
  special = {field: vocabulary[name] for field, name in SPECIAL_TOKENS.items()}
  return Tokenizer(
    folder, **special, size=max(vocabulary.values()) + 1, encode_text=encode, decode_ids=decode
  )


def _load_characters(folder: pathlib.Path, toy: Any) -> Tokenizer:
  """One id a character, `ord(character) + offset`, except for the special ids."""
  rule = "id = ord(char) + offset"
  if not isinstance(toy, dict) or toy.get("rule", rule) != rule:
    raise errors.InputError(
      f"{folder / config_lib.BAGEL_FILE}: toy_tokenizer={json.dumps(toy)} is not supported; its "
      f"rule must be {rule!r}"
    )
  vocab_size = config_lib.read_json(folder / config_lib.LLM_FILE).get("vocab_size")
  offset = toy.get("offset")
  special = {field: toy.get(field) for field in SPECIAL_TOKENS}
  for key, value in {"offset": offset, "vocab_size": vocab_size, **special}.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      where = "toy_tokenizer of " + config_lib.BAGEL_FILE
      raise errors.InputError(
        f"{folder}: {key}={value!r} in {config_lib.LLM_FILE if key == 'vocab_size' else where} "
        "must be a non-negative integer"
      )
  id_of_name = {name: special[field] for field, name in SPECIAL_TOKENS.items()}
  name_of_id = {i: name for name, i in id_of_name.items()}
  names = re.compile("(" + "|".join(re.escape(name) for name in id_of_name) + ")")

  def encode_character(character: str) -> int:
    i = ord(character) + offset
    if i >= vocab_size or i in name_of_id:
      raise errors.InputError(
        f"character {character!r} (U+{ord(character):04X}) has no id in the toy tokenizer of "
        f"{folder}; remove it from the text"
      )
    return i

  def encode(text: str) -> list[int]:
    ids = []
    for piece in names.split(text):
      ids += [id_of_name[piece]] if piece in id_of_name else map(encode_character, piece)
    return ids

  def decode(ids: Sequence[int]) -> str:
    return "".join(
      name_of_id.get(i) or (chr(i - offset) if i >= offset else "\ufffd") for i in ids
    )

  return Tokenizer(folder, **special, size=vocab_size, encode_text=encode, decode_ids=decode)
