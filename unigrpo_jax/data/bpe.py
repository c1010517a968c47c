"""Trains a small byte-level BPE in the file format of Qwen2.5's, for a small model.

Only the merges differ from Qwen2.5's, and the ids: bytes, merges, added tokens, in that order.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
import pathlib

import tokenizers

from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer as tokenizer_lib

# Names in the order of their ids in Qwen2.5, and whether the token is special: other programs skip
# special tokens when they decode text for people.
ADDED_TOKENS = dict.fromkeys((
  "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
  "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
), True) | dict.fromkeys((
  "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
  "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
), False)
LEAST_SIZE = 256 + len(ADDED_TOKENS)


def train_tokenizer(
  texts: Iterable[str], vocab_size: int, folder: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """Trains on `texts`, writes the files, and loads them; the same texts give the same bytes.

  `vocab_size` counts all ids, bytes and added tokens included; it is less where nothing is left to
  merge. The files are vocab.json, merges.txt, tokenizer_config.json and tokenizer.json.

  Raises:
    InputError: `vocab_size` is below `LEAST_SIZE`.
  """
  if vocab_size < LEAST_SIZE:
    raise errors.InputError(
      f"vocab_size={vocab_size}: the bytes and the added tokens alone need {LEAST_SIZE}"
    )
  transformers = tokenizer_lib.import_transformers()
  folder.mkdir(parents=True, exist_ok=True)
  qwen = transformers.Qwen2Tokenizer().backend_tokenizer
  learner = tokenizers.Tokenizer(tokenizers.models.BPE())
  learner.normalizer, learner.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
  learner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - len(ADDED_TOKENS), min_frequency=2, show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  ))
  # transformers would read an older one instead of the files written here.
  (folder / "tokenizer.json").unlink(missing_ok=True)
  learner.model.save(str(folder))
  _write_config(folder, learner.get_vocab_size())
  full = transformers.Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
  full.backend_tokenizer.save(str(folder / "tokenizer.json"))
  return tokenizer_lib.load(folder)


def _write_config(folder: pathlib.Path, first_id: int) -> None:
  """tokenizer_config.json, with the added tokens from `first_id` on."""
  plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
  special = [name for name, is_special in ADDED_TOKENS.items() if is_special]
  config = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": {
      str(i): {"content": name, "special": is_special} | plain
      for i, (name, is_special) in enumerate(ADDED_TOKENS.items(), first_id)
    },
    "additional_special_tokens": special[1:],
    "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
    "clean_up_tokenization_spaces": False, "eos_token": special[0], "errors": "replace",
    "model_max_length": 131072, "pad_token": special[0], "split_special_tokens": False,
    "unk_token": None,
  }
  text = json.dumps(config, indent=2) + "\n"
  (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
