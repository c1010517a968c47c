"""GenEval's prompts: the official file byte for byte, and those to train on."""

import collections
import hashlib
import json

import pytest

from tests import refusals
from unigrpo_jax.benchmarks import measured, results, validation
from unigrpo_jax.data import prompts as prompt_sets
from unigrpo_jax.geneval import classes, prompts


def test_the_official_file_byte_for_byte():
  """A numpy whose streams differ would fail here."""
  records = prompts.official()
  digest = lambda lines: hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
  assert digest(map(json.dumps, records)) == (
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
  )
  assert digest(record["prompt"] for record in records) == (
    "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
  )
  counts = collections.Counter(record["tag"] for record in records)
  assert tuple(counts) == prompts.TAGS and list(counts.values()) == [80, 99, 80, 94, 100, 100]


def test_prompts_to_train_on_are_others_in_a_mixture():
  records = prompts.train(rows=1700)
  assert not {r["prompt"] for r in records} & {r["prompt"] for r in prompts.official()}
  counts = collections.Counter(record["tag"] for record in records)
  assert counts == {tag: 100 * part for tag, part in prompts.MIXTURE.items()}
  assert counts["position"] == 700 and counts["counting"] == 500
  assert len({record["tag"] for record in records[:17]}) == 5  # Not tag by tag.
  assert prompts.train(rows=20) == records[:20]


def test_half_of_the_classes_are_unseen():
  used = lambda records: {entry["class"] for record in records for entry in record["include"]}
  test = prompts.unseen()
  assert len(test) == 1024 and len({record["prompt"] for record in test}) == 256
  assert used(test) == set(prompts.UNSEEN) <= set(classes.CLASSES) and len(prompts.UNSEEN) == 20
  assert used(prompts.make("geneval_unseen", "train", 1500)) == (
    set(classes.CLASSES) - set(prompts.UNSEEN)
  )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_they_are_sets_by_name(split):
  opened = prompt_sets.open_set("geneval", split)
  assert len(opened) == 553 and opened[0].prompt == "a photo of a bench"
  assert opened[0].metadata == prompts.official()[0]


@pytest.mark.parametrize("name, split, count, words", [
  ("geneval", "train", None, "geneval: split='train' is none of validation, test"),
  ("geneval_unseen", "validation", None, "is none of train, test"),
  ("geneval", "test", 554, "--count=554 must be at least 1 and at most 553"),
])
def test_what_they_do_not_have_is_refused(name, split, count, words):
  assert words in refusals.refusal(prompt_sets.generated, name, split, count)
  assert len(prompt_sets.generated("geneval_unseen", "test", 300)) == 300


def test_prompts_that_a_rewriter_wrote_are_recognised():
  own = [(record["prompt"], record) for record in prompts.official()]
  longer = [(f"{prompt}, in soft light", record) for prompt, record in own]
  assert prompts.is_rewritten(longer) and prompts.is_rewritten(longer[:9])
  assert not prompts.is_rewritten(own) and not prompts.is_rewritten(longer[1:])
  assert not prompts.is_rewritten([]) and not prompts.is_rewritten([("a kite", {})])


def test_tags_are_held_out_of_training():
  opened = prompt_sets.open_set("geneval", "test")
  kept = opened.without_tags(("position", "counting"))
  assert len(kept) == 553 - 180 and opened.without_tags(()) is opened
  assert {prompt.metadata["tag"] for prompt in kept} == {
    "single_object", "two_object", "colors", "color_attr"}
  assert kept.fingerprint() != opened.fingerprint()
  assert "held_out_tags: a tag='colour' is none of" in refusals.refusal(
    opened.without_tags, ("colour",))
  assert "are all tags" in refusals.refusal(opened.without_tags, prompts.TAGS)


def test_tags_that_are_numbers_or_missing_are_held_out_by_what_is_written_for_them():
  tags = {"a": {"tag": 1}, "b": {"tag": "1"}, "c": {}, "d": {"tag": 2}}
  tagged = prompt_sets.PromptSet([*tags.items()])
  of = lambda *left_out: [prompt.prompt for prompt in tagged.without_tags(left_out)]
  assert of("1") == ["c", "d"] and of("None", "2") == ["a", "b"]


def test_an_evaluation_within_a_run_logs_each_tag():
  rows = [
    results.Row("think + guidance", tag, "p", None, {"geneval": value, "reward": value}, None, i)
    for i, (tag, value) in enumerate([("colors", 1.0), ("colors", 0.0), ("position", 1.0)])
  ]
  made = validation.Validation._by_tag(None, results.Results(rows, {}))
  assert made == {
    f"eval/think+guidance/{name}/{tag}": value for name in ("geneval", "reward")
    for tag, value in (("colors", 0.5), ("position", 1.0), ("overall", 0.75))
  }
  examples = prompt_sets.open_set("geneval", "validation")
  assert measured.is_geneval(examples)
  assert not measured.is_geneval(prompt_sets.open_set("words", "test"))
