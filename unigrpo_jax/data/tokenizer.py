"""Text to token ids and back, from the files of a BAGEL folder; nothing is ever downloaded.

A released folder has the Qwen2.5 byte-level BPE. A folder of recorded reference outputs has a
character tokenizer instead, described by `toy_tokenizer` in its `bagel_config.json`.

There is no chat template: a text is its own ids and nothing else; whoever builds a sequence puts
`im_start` and `im_end` around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import logging
import pathlib
import re
from typing import Any
import unicodedata

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib

# What the released model was trained to think under. Token for token: each first line ends in a
# space, which is part of id 715.
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

SPECIAL_TOKENS = {
  "im_start": "<|im_start|>",
  "im_end": "<|im_end|>",
  "vision_start": "<|vision_start|>",
  "vision_end": "<|vision_end|>",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded tokenizer.

  Attributes:
    source: the folder it came from, for messages.
    im_start, im_end, vision_start, vision_end: ids of the special tokens.
    size: one more than the largest id it gives. An embedding may have more rows; they are untrained
      and decode to nothing.
    encode_text: NFC text -> ids.
    decode_ids: ids -> text.
  """

  source: pathlib.Path
  im_start: int
  im_end: int
  vision_start: int
  vision_end: int
  size: int
  encode_text: Callable[[str], list[int]] = dataclasses.field(repr=False)
  decode_ids: Callable[[Sequence[int]], str] = dataclasses.field(repr=False)

  def encode(self, text: str) -> list[int]:
    """Ids of `text` in NFC, with none added around it.

    The name of a special token inside the text becomes that token, as in the official code.

    Raises:
      InputError: the text cannot be encoded; the message quotes what cannot.
    """
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise errors.InputError(
        f"text {text[:60]!r} holds {text[error.start]!r}, which is not Unicode text; remove it"
      ) from None
    return self.encode_text(unicodedata.normalize("NFC", text))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, special tokens by name; cutting at an end token is the caller's.

    Ids that split a character give U+FFFD, so `encode(decode(ids))` need not be `ids`.
    """
    return self.decode_ids([int(i) for i in ids])

  def check_fits(self, vocab_size: int) -> None:
    """Raises InputError where an id has no row in an embedding of `vocab_size` rows."""
    if self.size > vocab_size:
      raise errors.InputError(
        f"{self.source}: the tokenizer gives ids up to {self.size - 1}, but "
        f"{config_lib.LLM_FILE} says vocab_size={vocab_size}; the two belong to different models"
      )


def load(folder: pathlib.Path | str) -> Tokenizer:
  """Loads the tokenizer of a BAGEL folder.

  Looks for `tokenizer.json`, then `vocab.json` with `merges.txt` (and a `tokenizer_config.json`
  that lists the added tokens), then `toy_tokenizer` in `bagel_config.json`.

  Raises:
    InputError: the folder has none of them, they do not load, or a special token is missing.
  """
  folder = pathlib.Path(folder)
  if (folder / "tokenizer.json").is_file():
    return _load_bpe(folder, "PreTrainedTokenizerFast", "tokenizer.json")
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    return _load_bpe(folder, "Qwen2Tokenizer", "vocab.json with merges.txt")
  bagel_path = folder / config_lib.BAGEL_FILE
  if bagel_path.is_file():
    toy = config_lib.read_json(bagel_path).get("toy_tokenizer")
    if toy is not None:
      return _load_characters(folder, toy)
  raise errors.InputError(
    f"{folder}: no tokenizer; looked for tokenizer.json, vocab.json with merges.txt, and "
    f"toy_tokenizer in {config_lib.BAGEL_FILE}"
  )


def _load_bpe(folder: pathlib.Path, class_name: str, files: str) -> Tokenizer:
  """Through transformers, by a class that is named here: no folder chooses what code runs."""
  with without_torch_notice():
    import transformers  # Slow to import, and most commands that fail early never need it.
  try:
    backend = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
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

  special = {}
  for field, name in SPECIAL_TOKENS.items():
    # vocab.json and merges.txt alone do not list the added tokens: transformers then answers every
    # unknown name with <|endoftext|>, and would read the name in a prompt as ordinary characters.
    if name not in vocabulary or encode(name) != [vocabulary[name]]:
      raise errors.InputError(
        f"{folder}: {files} does not define {name} as one token; add the released model's "
        "tokenizer.json, or its tokenizer_config.json, which list the added tokens"
      )
    special[field] = vocabulary[name]
  _check_distinct(folder, special)
  return Tokenizer(
    folder, **special, size=max(vocabulary.values()) + 1, encode_text=encode, decode_ids=decode
  )


def _check_distinct(folder: pathlib.Path, special: dict[str, int]) -> None:
  if len(set(special.values())) < len(special):
    raise errors.InputError(f"{folder}: special tokens share an id: {special}; give each its own")


@contextlib.contextmanager
def without_torch_notice() -> Iterator[None]:
  """Drops the one line with which transformers greets a machine without PyTorch."""
  logger = logging.getLogger("transformers")

  def keep(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _load_characters(folder: pathlib.Path, toy: Any) -> Tokenizer:
  """One id a character, `ord(character) + offset`, but for the special ids."""
  path = folder / config_lib.BAGEL_FILE
  rule = "id = ord(char) + offset"
  if not isinstance(toy, dict) or toy.get("rule", rule) != rule:
    raise errors.InputError(
      f"{path}: toy_tokenizer={json.dumps(toy)} is not supported; its rule must be {rule!r}"
    )
  vocab_size = config_lib.read_json(folder / config_lib.LLM_FILE).get("vocab_size")
  numbers = {"offset": toy.get("offset"), "vocab_size": vocab_size}
  numbers |= {field: toy.get(field) for field in SPECIAL_TOKENS}
  for key, value in numbers.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      where = config_lib.LLM_FILE if key == "vocab_size" else f"toy_tokenizer of {path.name}"
      raise errors.InputError(
        f"{folder}: {key}={value!r} in {where} must be a non-negative integer"
      )
  offset = numbers["offset"]
  special = {field: numbers[field] for field in SPECIAL_TOKENS}
  _check_distinct(folder, special)
  id_of_name = {name: special[field] for field, name in SPECIAL_TOKENS.items()}
  name_of_id = {i: name for name, i in id_of_name.items()}
  split = re.compile("(" + "|".join(re.escape(name) for name in id_of_name) + ")")

  def encode_character(character: str) -> int:
    i = ord(character) + offset
    if i >= vocab_size or i in name_of_id:
      raise errors.InputError(
        f"character {character!r} (U+{ord(character):04X}) has no id in the toy tokenizer of "
        f"{folder}; remove it from the text"
      )
    return i

  def encode(text: str) -> list[int]:
    ids: list[int] = []
    for piece in split.split(text):
      if piece in id_of_name:
        ids.append(id_of_name[piece])
      else:
        ids.extend(encode_character(character) for character in piece)
    return ids

  def decode(ids: Sequence[int]) -> str:
    return "".join(
      name_of_id.get(i) or (chr(i - offset) if i >= offset else "\ufffd") for i in ids
    )

  return Tokenizer(folder, **special, size=vocab_size, encode_text=encode, decode_ids=decode)
