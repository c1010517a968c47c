"""Trains a small byte-level BPE in the file format of Qwen2.5's, for a small model.

It behaves as the real one does: the same normal form, the same split into words and digits before
any merge, every byte an id, the same special tokens by name. Only the merges are its own, and the
ids: bytes, merges, added tokens, in that order. `tokenizer.load` reads both alike.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
import pathlib

import tokenizers

from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer as tokenizer_lib

# Names in the order of the ids of Qwen2.5, and whether the token is special: skipped when a text
# is decoded for people, in other programs.
ADDED_TOKENS = {
  "<|endoftext|>": True,
  "<|im_start|>": True,
  "<|im_end|>": True,
  "<|object_ref_start|>": True,
  "<|object_ref_end|>": True,
  "<|box_start|>": True,
  "<|box_end|>": True,
  "<|quad_start|>": True,
  "<|quad_end|>": True,
  "<|vision_start|>": True,
  "<|vision_end|>": True,
  "<|vision_pad|>": True,
  "<|image_pad|>": True,
  "<|video_pad|>": True,
  "<tool_call>": False,
  "</tool_call>": False,
  "<|fim_prefix|>": False,
  "<|fim_middle|>": False,
  "<|fim_suffix|>": False,
  "<|fim_pad|>": False,
  "<|repo_name|>": False,
  "<|file_sep|>": False,
}
LEAST_SIZE = 256 + len(ADDED_TOKENS)


def train_tokenizer(
  texts: Iterable[str], vocab_size: int, folder: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """Trains on `texts`, writes the files, and loads them; the same texts give the same bytes.

  Writes vocab.json, merges.txt, tokenizer_config.json and tokenizer.json.

  Args:
    texts: what to compress; a text that comes twice counts twice.
    vocab_size: ids in all, bytes and added tokens included; fewer where nothing is left to merge.
    folder: made if it does not exist.

  Raises:
    InputError: `vocab_size` is below `LEAST_SIZE`.
  """
  if vocab_size < LEAST_SIZE:
    raise errors.InputError(
      f"vocab_size={vocab_size}: the bytes and the added tokens alone need {LEAST_SIZE}"
    )
  with tokenizer_lib.without_torch_notice():
    import transformers  # Slow to import.

  folder.mkdir(parents=True, exist_ok=True)
  # Of an untrained Qwen2 tokenizer: the normal form and the split are taken, not written again.
  qwen = transformers.Qwen2Tokenizer().backend_tokenizer
  learner = tokenizers.Tokenizer(tokenizers.models.BPE())
  learner.normalizer, learner.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
  learner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - len(ADDED_TOKENS), min_frequency=2, show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  ))
  # transformers would read an older one in place of what is written here.
  (folder / "tokenizer.json").unlink(missing_ok=True)
  learner.model.save(str(folder))
  _write_config(folder, learner.get_vocab_size())
  full = transformers.Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
  full.backend_tokenizer.save(str(folder / "tokenizer.json"))
  return tokenizer_lib.load(folder)


def _write_config(folder: pathlib.Path, first: int) -> None:
  """tokenizer_config.json, with the added tokens from id `first`."""
  plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
  special = [name for name, is_special in ADDED_TOKENS.items() if is_special]
  config = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": {
      str(i): {"content": name, "special": ADDED_TOKENS[name]} | plain
      for i, name in enumerate(ADDED_TOKENS, first)
    },
    "additional_special_tokens": special[1:],
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": special[0],
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": special[0],
    "split_special_tokens": False,
    "unk_token": None,
  }
  text = json.dumps(config, indent=2) + "\n"
  (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
