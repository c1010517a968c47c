"""The Qwen2.5 tokenizer by its real vocabulary, the toy one, and broken folders; see test_bpe."""

import json
import lzma
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import refusals
from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"

GEN_IDS = """
2610 1265 1156 1744 911 279 9115 1882 304 279 3971 323 1221 6923 279 2168 13 715 785 9115 1882 374
43810 2878 366 26865 29 690 26865 29 9492 11 600 1734 13 366 26865 29 9115 1882 1588 690 26865 29
2168 1588
"""
VLM_IDS = """
2610 1265 1156 1744 911 279 32711 1882 304 279 3971 323 1221 3410 279 1196 448 279 4226 13 715 785
32711 1882 374 43810 2878 366 26865 29 690 26865 29 9492 11 600 1734 13 366 26865 29 32711 1882
1588 690 26865 29 4226 1588
"""


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen")
  for name in ("vocab.json", "merges.txt"):
    (folder / name).write_bytes(lzma.decompress((HERE / "tokenizer" / f"{name}.xz").read_bytes()))
  shutil.copy(HERE / "tokenizer" / "tokenizer_config.json", folder)
  return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder):
  return tokenizer.load(qwen_folder)


@pytest.fixture(scope="module")
def toy():
  return tokenizer.load(GOLDEN)


def refusal(folder):
  message = refusals.refusal(tokenizer.load, folder)
  assert str(folder) in message
  return message


def test_special_ids_and_size(qwen):
  assert (qwen.im_start, qwen.im_end) == (151644, 151645)
  assert (qwen.vision_start, qwen.vision_end) == (151652, 151653)
  assert qwen.size == 151665


def test_system_prompts_token_for_token(qwen):
  gen, vlm = [int(i) for i in GEN_IDS.split()], [int(i) for i in VLM_IDS.split()]
  assert (len(gen), len(vlm)) == (46, 49)
  assert qwen.encode(tokenizer.SYSTEM_PROMPT_GEN) == gen
  assert qwen.encode(tokenizer.SYSTEM_PROMPT_VLM) == vlm
  assert qwen.decode(gen) == tokenizer.SYSTEM_PROMPT_GEN


def test_think_marks_are_ordinary_text(qwen):
  assert qwen.encode("<think>") == [13708, 766, 29]
  assert qwen.encode("</think>") == [522, 26865, 29]


def test_nothing_is_added(qwen):
  assert qwen.encode("") == []
  assert qwen.encode("a") == [64]


def test_special_strings_become_their_ids(qwen):
  assert qwen.encode("a<|im_end|>") == [64, 151645]
  assert qwen.encode("<|im_start|> a <|vision_end|>")[0] == 151644
  assert qwen.decode([151644, 64, 151645]) == "<|im_start|>a<|im_end|>"


def test_decode_takes_arrays_and_untrained_ids(qwen):
  assert qwen.decode(np.array([64, 151700, 64])) == "aa"


def test_check_fits(qwen):
  qwen.check_fits(152064)
  qwen.check_fits(151665)
  with pytest.raises(errors.InputError, match="151664.*vocab_size=300"):
    qwen.check_fits(300)


def test_tokenizer_json_gives_the_same(qwen, qwen_folder, tmp_path):
  import transformers

  full = transformers.Qwen2Tokenizer.from_pretrained(qwen_folder, local_files_only=True)
  full.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
  alone = tokenizer.load(tmp_path)
  assert (alone.im_start, alone.vision_end, alone.size) == (151644, 151653, 151665)
  text = tokenizer.SYSTEM_PROMPT_GEN + "<|im_end|> cafe\u0301 1234 \U0001f600"
  assert alone.encode(text) == qwen.encode(text)


def test_vocabulary_without_added_tokens_is_refused(qwen_folder, tmp_path):
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).symlink_to(qwen_folder / name)
  message = refusal(tmp_path)
  assert "<|im_start|>" in message and "tokenizer_config.json" in message


def test_folder_without_tokenizer_names_what_was_looked_for(tmp_path):
  message = refusal(tmp_path)
  for name in ("tokenizer.json", "vocab.json", "merges.txt", "bagel_config.json"):
    assert name in message


def test_broken_files_are_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{")
  assert "tokenizer.json does not load" in refusal(tmp_path)


def test_toy_reproduces_the_recorded_ids(toy):
  recorded = np.load(GOLDEN / "h_think_t2i.npz")["call0_text_ids"].tolist()
  ids = toy.encode(tokenizer.SYSTEM_PROMPT_GEN)
  assert [toy.im_start, *ids, toy.im_end] == recorded
  assert (toy.vision_start, toy.vision_end, toy.size) == (285, 286, 300)
  toy.check_fits(300)


def test_toy_round_trip(toy):
  thought = np.load(GOLDEN / "h_think_t2i.npz")["out_text_ids"].tolist()
  assert toy.encode(toy.decode(thought)) == thought
  assert toy.decode([280, 68, 281, 1]) == "<|im_start|>A<|im_end|>\ufffd"
  assert toy.encode("<|im_start|>A<|im_end|>") == [280, 68, 281]


@pytest.mark.parametrize("character", [chr(280 - 3), chr(286 - 3), chr(300 - 3), "\u6f22"])
def test_toy_refuses_characters_without_an_id(toy, character):
  with pytest.raises(errors.InputError, match=f"U\\+{ord(character):04X}"):
    toy.encode(f"ab{character}")


@pytest.mark.parametrize("change, words", [
  ({"rule": "id = 7"}, "rule"),
  ({"offset": None}, "offset=None"),
  ({"im_end": 280}, "share an id"),
  ({"vision_end": "286"}, "vision_end='286'"),
])
def test_toy_description_is_checked(change, words, tmp_path):
  description = json.loads((GOLDEN / "bagel_config.json").read_text())
  description["toy_tokenizer"] |= change
  (tmp_path / "bagel_config.json").write_text(json.dumps(description))
  shutil.copy(GOLDEN / "llm_config.json", tmp_path)
  assert words in refusal(tmp_path)


def test_loading_is_quiet(qwen_folder):
  program = "import sys; from unigrpo_jax.data import tokenizer; tokenizer.load(sys.argv[1])"
  done = subprocess.run(
    [sys.executable, "-c", program, qwen_folder], capture_output=True, text=True, cwd=HERE.parent
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
