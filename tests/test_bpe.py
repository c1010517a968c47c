"""The trained byte-level BPE: it behaves as the real Qwen2.5 tokenizer does, in fewer ids."""

import json
import pathlib
import random
import subprocess
import sys
import unicodedata

import pytest

from tests import test_tokenizer
from unigrpo_jax import errors
from unigrpo_jax.data import bpe, tokenizer
from unigrpo_jax.runtime import folders

HERE = pathlib.Path(__file__).parent
FILES = ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
SYSTEM = [tokenizer.SYSTEM_PROMPT_GEN, tokenizer.SYSTEM_PROMPT_VLM]
TEXTS = [
  *SYSTEM * 20,
  *["half of six is three, so three kites", "the colour of grass is green", "two of 12"] * 10,
]

# The real one, by the fixtures of its own tests.
qwen_folder, qwen = test_tokenizer.qwen_folder, test_tokenizer.qwen


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
  return bpe.train_tokenizer(TEXTS, 640, tmp_path_factory.mktemp("tiny")).source


@pytest.fixture(scope="session")
def tiny(tiny_folder):
  return tokenizer.load(tiny_folder)


@pytest.fixture(scope="session")
def embedded():
  """IconWorld's own, of the embedded checkpoint."""
  return tokenizer.load(folders.TINY_FOLDER)


@pytest.fixture(params=["qwen", "tiny", "embedded"])
def either(request):
  return request.getfixturevalue(request.param)


def random_text(seed, length=200):
  """Characters of every plane, composed, among plain words, spaces and halves of special names."""
  draw = random.Random(seed)
  pieces = []
  for _ in range(length):
    code = draw.randrange(draw.choice([128, 0x3000, 0x110000]))
    plain = draw.choice(["six kites ", "  ", "\n", "<|", "|>"])
    surrogate = 0xD800 <= code < 0xE000
    pieces.append(plain if surrogate or draw.random() < 0.2 else chr(code))
  return unicodedata.normalize("NFC", "".join(pieces))


@pytest.mark.parametrize("seed", range(8))
def test_any_text_comes_back(either, seed):
  text = random_text(seed)
  assert either.decode(either.encode(text)) == text


@pytest.mark.parametrize("text", [
  *SYSTEM, " leading\n\n  and trailing \n", "\t\r\n", "don 't clean , these . spaces", "1234567890",
  "A red cube, on  a blue plate .", "caf\u00e9 \u6f22\u5b57 \U0001f600",
  "".join(map(chr, range(0x250))),
])
def test_spaces_punctuation_and_controls_come_back(either, text):
  assert either.decode(either.encode(text)) == text


def test_text_is_composed_first(either):
  assert either.encode("cafe\u0301 A\u030a") == either.encode("caf\u00e9 \u00c5")


def test_nothing_is_added(either):
  assert either.encode("") == []
  assert len(either.encode("a")) == 1


def test_a_digit_is_an_id(either):
  assert len(either.encode("1234567890")) == 10


@pytest.mark.parametrize("name", bpe.ADDED_TOKENS)
def test_added_tokens_are_one_id_wherever_they_stand(either, name):
  [i] = either.encode(name)
  assert either.size - len(bpe.ADDED_TOKENS) <= i < either.size
  assert either.encode(f"a{name}b") == [*either.encode("a"), i, *either.encode("b")]
  assert either.decode([i]) == name


def test_half_a_name_is_text(either):
  first_added = either.size - len(bpe.ADDED_TOKENS)
  for text in ("<|im_end", "im_end|>", "<think>", "</think>", "<|IM_END|>"):
    ids = either.encode(text)
    assert len(ids) > 1 and max(ids) < first_added
    assert either.decode(ids) == text


def test_specials_of_a_sequence(either):
  named = [either.im_start, either.im_end, either.vision_start, either.vision_end]
  assert either.encode("<|im_start|><|im_end|><|vision_start|><|vision_end|>") == named
  assert either.decode([either.im_start, *either.encode("a"), either.im_end]) == (
    "<|im_start|>a<|im_end|>"
  )


def test_half_a_character_and_untrained_ids(either):
  ids = either.encode("\U00013000")  # a hieroglyph, several ids
  assert len(ids) > 1 and "\ufffd" in either.decode(ids[:1])
  assert either.decode([either.size + 3, *either.encode("a")]) == "a"


def test_text_that_is_not_unicode_is_refused(either):
  with pytest.raises(errors.InputError, match="not Unicode"):
    either.encode("a\udcff")


def test_an_embedding_must_have_a_row_for_every_id(either):
  either.check_fits(either.size)
  with pytest.raises(errors.InputError, match=f"{either.size - 1}"):
    either.check_fits(either.size - 1)


def test_only_the_merges_differ_from_the_real_one(qwen_folder, tiny_folder, tmp_path):
  import transformers

  real = transformers.Qwen2Tokenizer.from_pretrained(qwen_folder, local_files_only=True)
  real.backend_tokenizer.save(str(tmp_path / "real.json"))
  real = json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))
  trained = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
  for key in (*real, *trained):
    if key not in ("model", "added_tokens"):
      assert trained[key] == real[key], key
  for key in real["model"]:
    if key not in ("vocab", "merges"):
      assert trained["model"][key] == real["model"][key], key
  without_ids = lambda tokens: [{k: v for k, v in token.items() if k != "id"} for token in tokens]
  assert without_ids(trained["added_tokens"]) == without_ids(real["added_tokens"])


def test_added_tokens_are_those_of_the_real_one():
  config = json.loads((HERE / "tokenizer" / "tokenizer_config.json").read_text())
  real = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
  assert [(t["content"], t["special"]) for _, t in real] == list(bpe.ADDED_TOKENS.items())


def test_ids_are_bytes_then_merges_then_added_tokens(tiny_folder, tiny):
  vocabulary = json.loads((tiny_folder / "vocab.json").read_text(encoding="utf-8"))
  merges = (tiny_folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
  assert sorted(vocabulary.values()) == list(range(256 + len(merges)))
  assert all((len(token) == 1) == (i < 256) for token, i in vocabulary.items())
  assert tiny.size == 256 + len(merges) + 22 <= 640
  assert tiny.encode("<|endoftext|>") == [256 + len(merges)]


def test_vocab_size_is_reached_where_there_is_enough_to_merge(tmp_path):
  assert bpe.train_tokenizer(TEXTS, 300, tmp_path).size == 300


def test_frequent_words_are_one_id(qwen, tiny):
  """As short as with the 151,643 merges of the real one, since all its words were merged."""
  for text in SYSTEM:
    assert len(tiny.encode(text)) == len(qwen.encode(text))


def test_the_same_texts_give_the_same_bytes(tiny_folder, tmp_path):
  shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
  bpe.train_tokenizer(shuffled, 640, tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
  for name in FILES:
    assert (tmp_path / name).read_bytes() == (tiny_folder / name).read_bytes(), name


def test_training_again_replaces_every_file(tiny_folder, tmp_path):
  bpe.train_tokenizer(["something else"] * 3, 300, tmp_path)
  bpe.train_tokenizer(TEXTS, 640, tmp_path)
  for name in FILES:
    assert (tmp_path / name).read_bytes() == (tiny_folder / name).read_bytes(), name


def test_vocabulary_and_merges_alone_give_the_same(tiny_folder, tiny, tmp_path):
  for name in FILES:
    if name != "tokenizer.json":
      (tmp_path / name).symlink_to(tiny_folder / name)
  alone = tokenizer.load(tmp_path)
  assert (alone.im_start, alone.vision_end, alone.size) == (
    tiny.im_start, tiny.vision_end, tiny.size
  )
  for text in (*SYSTEM, random_text(99), "cafe\u0301<|im_end|>12"):
    assert alone.encode(text) == tiny.encode(text)


def test_nothing_to_learn_from_still_encodes_bytes(tmp_path):
  bytes_only = bpe.train_tokenizer([], 640, tmp_path)
  assert bytes_only.size == bpe.LEAST_SIZE
  assert len(bytes_only.encode("kite")) == 4


def test_too_few_ids_are_refused(tmp_path):
  with pytest.raises(errors.InputError, match="vocab_size=277.*278"):
    bpe.train_tokenizer(TEXTS, 277, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_training_is_quiet(tmp_path):
  program = (
    "import pathlib, sys; from unigrpo_jax.data import bpe; "
    "bpe.train_tokenizer(['a kite', 'a kite'], 300, pathlib.Path(sys.argv[1]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=HERE.parent
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
