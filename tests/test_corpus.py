"""What is learnt: IconWorld's mixtures, and the shards of users, line by line and by epochs."""

import hashlib
import json
import re
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from tests import refusals
from unigrpo_jax.supervised import corpus


def test_iconworld_mixtures_and_wrong_plans():
  from unigrpo_jax.iconworld import plans, verifier

  rng = np.random.default_rng(0)
  wrong = corpus.iconworld({"draw_think": 1.0}, wrong_plan_rate=1.0)
  for _ in range(20):
    example = wrong(0, rng)
    # The picture follows the plan, so drawing stays honest where reasoning goes wrong.
    drawn = sorted((d.kind, d.color) for d in verifier.detect(np.array(example.target)))
    plan = plans.plan_of(example.text)
    assert drawn == sorted((thing.kind, thing.color) for thing in plan.things)
  mixed = corpus.iconworld(dict.fromkeys(corpus.TASKS, 1.0), wrong_plan_rate=0.0)
  examples = [mixed(row, rng) for row in range(60)]
  kinds = {(e.text is None, e.target is None, e.source is None) for e in examples}
  assert len(kinds) == 4


@pytest.mark.parametrize("mixture, rate, words", [
  ({"drawn": 1.0}, 0.0, "config.data.mixture='drawn' is none of .* did you mean 'draw'"),
  ({"draw": 2.0, "edit": -1.0}, 0.0, "config.data.mixture.edit=-1.0 must be at least 0"),
  ({"draw": float("nan")}, 0.0, "config.data.mixture.draw=nan"),
  ({"draw": 0.0}, 0.0, "config.data.mixture={'draw': 0.0} has no task"),
  ({}, 0.0, "config.data.mixture={} has no task"),
  ({"draw": 1.0}, 7.0, "config.data.wrong_plan_rate=7.0 must be at least 0 and at most 1"),
])
def test_impossible_mixtures_name_their_key(mixture, rate, words):
  message = refusals.refusal(corpus.iconworld, mixture, wrong_plan_rate=rate)
  assert re.match(words, message), message


@pytest.fixture
def shard(tmp_path):
  """Writes lines, objects or bytes, as a shard beside two images; gives the folder."""
  PIL.Image.new("RGB", (32, 32), (7,) * 3).save(tmp_path / "a.png")
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

  def write(*lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "one.jsonl").write_bytes(b"\n".join(raw))
    return tmp_path

  return write


DRAWN = {"prompt": "a kite", "image": "a.png"}


@pytest.mark.parametrize("row, text, images", [
  (DRAWN, None, "target"),
  (DRAWN | {"reasoning": " <think>one </think>\n"}, " <think>one </think>\n", "target"),
  (DRAWN | {"source": "a.png"}, None, "target source"),
  (DRAWN | {"source": "a.png", "reasoning": "r"}, "r", "target source"),
  ({"prompt": "how many?", "answer": "one"}, "one", ""),
  ({"prompt": "how many?", "answer": "one", "source": "a.png"}, "one", "source"),
])
def test_a_line_of_a_shard_is_an_example(shard, row, text, images):
  """Its texts are those of the file, to the letter."""
  folder = shard(b"", row, b"  ")
  example = corpus.shards(folder, seed=0)(0, np.random.default_rng(0))
  assert (example.prompt, example.text) == (row["prompt"], text)
  for name in ("target", "source"):
    assert (getattr(example, name) is not None) == (name in images)
  assert example.where == f"{folder / 'one.jsonl'}, line 2"


@pytest.mark.parametrize("line, words", [
  (b"{", "not JSON"),
  (b"[" * 100_000, "not JSON"),
  (b'{"prompt": ' + b"1" * 6000 + b"}", "not JSON"),
  (b'{"prompt": "a", "prompt": "b", "image": "a.png"}', "'prompt' is there twice"),
  (b"\xff", "not UTF-8"),
  ([], "is not an object; expected an object"),
  ({"image": "a.png"}, 'no key "prompt"'),
  ({"prompt": "a"}, 'none of "image" to draw and "answer" to learn'),
  ({"prompt": "a", "reasoning": "b"}, 'none of "image" to draw'),
  (DRAWN | {"answer": "one"}, 'both of "image" to draw and "answer" to learn; give one'),
  ({"prompt": "a", "answer": "b", "reasoning": "c", "source": "a.png"}, '"reasoning" beside'),
  (DRAWN | {"reasonning": "b"}, "key='reasonning' is none of .* did you mean 'reasoning'"),
  (DRAWN | {"prompt": " "}, "the prompt is empty"),
  (DRAWN | {"reasoning": "\n"}, "the reasoning is empty"),
  ({"prompt": "a", "answer": ""}, "the answer is empty"),
  (DRAWN | {"reasoning": None}, "reasoning=null must be text"),
  (DRAWN | {"image": 3}, "image=3 must be text"),
  (DRAWN | {"image": "b.png"}, "image='b.png' is no file in "),
  (DRAWN | {"source": "."}, "source='.' is no file in "),
  (DRAWN | {"source": "b" * 300}, "source='b+' is no file in "),
  (DRAWN | {"source": "a\0.png"}, "is no file in "),
  (DRAWN | {"source": "a\0/b.png"}, "is no file in "),
])
def test_a_bad_line_of_a_shard_is_named_before_training(shard, line, words):
  folder = shard(DRAWN, line)
  message = refusals.refusal(corpus.shards, folder, seed=0)
  assert message.startswith(f"{folder / 'one.jsonl'}, line 2: ")
  assert re.search(words, message), message


def test_shards_that_are_no_files(shard, tmp_path):
  refusal = lambda folder: refusals.refusal(corpus.shards, folder, seed=0)
  assert "no *.jsonl shards" in refusal(tmp_path / "nowhere")
  assert "its shards are empty" in refusal(shard(b"", b""))
  (tmp_path / "x.jsonl").mkdir()
  assert f"{tmp_path / 'x.jsonl'}: cannot be read" in refusal(tmp_path)


def test_an_image_that_cannot_be_read_names_its_line(shard):
  folder = shard(DRAWN | {"image": "broken.png"})
  examples = corpus.shards(folder, seed=0)
  message = refusals.refusal(examples, 0, np.random.default_rng(0))
  assert message.startswith(f"{folder / 'one.jsonl'}, line 1: {folder / 'broken.png'}: ")


def test_every_epoch_has_each_example_once_in_an_order_of_its_own(shard):
  folder = shard(*({"prompt": str(number), "answer": "one"} for number in range(10)))
  orders = {}
  for seed in (0, 1):
    examples = corpus.shards(folder, seed=seed)
    rows = [examples(row, None).prompt for row in range(30)]
    # In any order: hosts ask for rows of their own, and a resumed run for later ones.
    assert [examples(row, None).prompt for row in reversed(range(30))] == rows[::-1]
    orders[seed] = [rows[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(order, key=int) == [*map(str, range(10))] for order in orders[seed])
  assert len(set(map(tuple, orders[0] + orders[1]))) == 6


def test_the_fingerprint_of_a_large_shard_takes_little_memory(shard):
  folder = shard({"prompt": "a", "answer": "b" * 2**24})
  tracemalloc.start()
  try:
    digits = corpus.fingerprint(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**22
  finally:
    tracemalloc.stop()
  data = (folder / "one.jsonl").read_bytes()
  whole = b"one.jsonl %d\n" % len(data) + data
  assert digits == hashlib.blake2b(whole, digest_size=8).hexdigest()


def test_an_epoch_may_be_shorter_than_a_step(shard):
  examples = corpus.shards(shard({"prompt": "how many?", "answer": "one"}), seed=0)
  assert {examples(row, None).prompt for row in range(5)} == {"how many?"}
