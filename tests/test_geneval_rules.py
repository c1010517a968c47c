"""GenEval's filter and verdicts, by hand and as other projects recorded them."""

import json

import pytest

from tests.parity import cases, geneval_rules
from unigrpo_jax.geneval import classes, rules


def found(kind, color="red", box=(0, 0, 10, 10), score=0.95):
  return rules.Found(kind, color, box, score)


def scores(objects, *include, exclude=()):
  metadata = {"include": list(include), "exclude": list(exclude)}
  return [rules.verdict(objects, metadata, rule=rule)[0] for rule in rules.RULES]


def test_words():
  assert len(set(classes.CLASSES)) == 80 and len(classes.COLORS) == 10
  assert classes.with_article("orange") == "an orange" and classes.with_article("bus") == "a bus"
  assert classes.plural("bus") == "buses" and classes.plural("knife") == "knifes"


def test_every_recorded_verdict_is_reproduced(golden_rewards):
  report = cases.Report("rules")
  geneval_rules.verdicts(golden_rewards / "geneval" / "rules.jsonl", report)
  assert len(report.lines) == 4 and all(line.result == cases.PASS for line in report.lines)


def test_soft_is_negative_only_without_clip(golden_rewards):
  rows = map(json.loads, (golden_rewards / "geneval" / "rules.jsonl").read_text().splitlines())
  free = [row["soft_unirl"] for row in rows]
  assert sum(score < 0 for score in free) == 24
  three = [found("cup")] * 3
  one = {"include": [{"class": "cup", "count": 1}]}
  assert rules.verdict(three, one, rule="soft", clip=False)[0] == -1
  assert rules.verdict(three, one, rule="soft")[0] == 0


def test_the_filter():
  cup = {"include": [{"class": "cup", "count": 1}]}
  counting = cup | {"tag": "counting"}
  objects = [found("cup", score=score) for score in (0.3, 0.31, 0.9, 0.91)]
  kept = lambda metadata: [
    item.score for item in rules.kept(objects, metadata, thresholds=(0.3, 0.9))
  ]
  assert kept(cup) == [0.91, 0.9, 0.31] and kept(counting) == [0.91]
  many = [found("cup", str(i), score=0.5) for i in range(20)] + [found("dog", score=0.4)]
  first = rules.kept(many, cup, thresholds=(0.3, 0.9))
  assert [item.color for item in first[:2]] == ["19", "18"] and len(first) == 17


def test_more_objects_and_exclude():
  two, one = [found("cup")] * 2, {"class": "cup", "count": 1}
  assert scores(two, one) == [1, 0, 0, 0]
  assert scores(two, one, exclude=[one | {"count": 2}]) == [0, 0, 0, 0]
  # Only the official rule reads exclude.
  assert scores([*two[:1], found("dog")], one, exclude=[{"class": "dog", "count": 1}]) == [
    0, 1, 1, 1
  ]


def test_colours():
  pair = {"class": "cup", "count": 2, "color": "red"}
  assert scores([found("cup"), found("cup", "blue")], pair) == [0, 0, 0.75, 0.75]
  assert scores([found("cup")], pair) == [0, 0, 0.25, 0.25]
  # The official rule looks at the two most confident, the strict one wants no third.
  three = [found("cup"), found("cup"), found("cup", "blue", score=0.5)]
  assert scores(three, pair) == [1, 0, 0.25, 0.25]


def test_positions():
  include = {"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}
  dog, cup = found("dog", box=(50, 0, 60, 10)), found("cup")
  assert scores([dog, cup], *include) == [1, 1, 1, 1]
  swapped = [found("dog"), found("cup", box=(50, 0, 60, 10))]
  assert scores(swapped, *include) == [0, 0, pytest.approx(2 / 3), 0.75]
  # Without a target there is one 0, in both.
  assert scores([cup], *include) == [0, 0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
  # A second dog leaves no target where the number is exact; officially the most confident counts.
  far = found("dog", box=(0, 50, 10, 60), score=0.5)
  assert scores([dog, far, cup], *include)[:2] == [1, 0]


def test_the_faults_are_named():
  metadata = {"include": [
    {"class": "dog", "count": 2, "color": "red"},
    {"class": "cup", "count": 1, "position": ["above", 0]},
  ], "exclude": [{"class": "cup", "count": 2}]}
  dogs = [found("dog"), found("dog", "blue")]
  faults = lambda objects, rule: rules.verdict(objects, metadata, rule=rule)[1]
  assert faults([*dogs, found("cup"), found("cup")], "official") == [
    "dog: 1 red of 2 wanted, found red, blue", "cup: no dog to be above",
    "cup: 2 found, fewer than 2 wanted",
  ]
  assert faults(dogs[:1], "strict") == [
    "dog: 1 found, exactly 2 wanted", "cup: 0 found, exactly 1 wanted"
  ]
  assert faults([dogs[0], dogs[0], found("cup")], "official") == ["cup: not above dog"]
  with pytest.raises(ValueError, match="official, strict"):
    rules.verdict([], metadata, rule="lenient")
