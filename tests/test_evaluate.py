"""The evaluate command and the rewards and tasks of IconWorld."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors, evaluate, rewards
from unigrpo_jax.benchmarks import iconworld as iconworld_tasks
from unigrpo_jax.benchmarks import results
from unigrpo_jax.data import progress
from unigrpo_jax.episodes import pipeline
from unigrpo_jax.iconworld import plans, prompts, renderer
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.rewards import iconworld as iconworld_rewards
from unigrpo_jax.runtime import folders
from unigrpo_jax.tools import sampling_flags


@pytest.fixture(scope="module")
def examples():
  return prompts.fixed("validation", 12)


def _sample(example, image, text=None):
  return rewards.Sample(example.prompt, image, text, example.metadata)


def test_the_scores_true_and_empty_pictures(examples):
  rng = np.random.default_rng(0)
  right = [_sample(e, renderer.render(e.scene, rng), e.reasoning) for e in examples]
  scores = iconworld_rewards.score(right)
  assert set(scores) == set(iconworld_rewards.REWARDS)
  for values in scores.values():
    np.testing.assert_array_equal(values, 1.0)
  empty = np.full((32, 32, 3), 255, np.uint8)
  wrong = [_sample(e, empty, plans.corrupt(rng, e)) for e in examples]
  scores = iconworld_rewards.score(wrong)
  np.testing.assert_array_equal(scores["strict"], 0.0)
  np.testing.assert_array_equal(scores["points"], 0.0)
  np.testing.assert_array_equal(scores["reasoning"], 0.0)
  [unthought] = iconworld_rewards.score([_sample(examples[0], empty)])["reasoning"]
  assert math.isnan(unthought)


def test_prompts_that_are_not_about_iconworld_have_no_rewards(examples):
  for metadata in ({}, {"include": [{"class": "zeppelin", "count": 1}]}):
    other = dataclasses.replace(examples[0], metadata=metadata)
    scores = iconworld_rewards.score([
      _sample(e, np.zeros((32, 32, 3), np.uint8), "so:") for e in (other, examples[1])
    ])
    for values in scores.values():
      assert math.isnan(values[0]) and values[1] == 0


def _run_task(monkeypatch, task, examples, result_of):
  """Runs a task with its requests answered by `result_of`."""
  monkeypatch.setattr(
    iconworld_tasks, "_run",
    lambda name, pipe, requests, settings, rows: [
      result_of(request, settings) for request in requests
    ],
  )
  settings = sampling_flags.settings(
    evaluate.parse_args(["--out=unused"]), config_lib.bagel_7b().generation
  )
  return iconworld_tasks.TASKS[task](
    None, examples, settings=settings, batch_size=4, seed=0)


def test_answers_are_right_where_the_word_is(monkeypatch, examples):
  """"one" to everything is right as often as there is one of something."""
  def one(request, settings):
    assert settings.understand and settings.temperature == 0 and request.image.size == (32, 32)
    return pipeline.Result(" one", (), True, None)

  rows = _run_task(monkeypatch, "answer", examples, one)
  assert {row.category for row in rows} == {"count", "color"} and len(rows) == len(examples)
  for row in rows:
    assert row.category == ("count" if row.prompt.startswith("how many") else "color")
  right = [row for row in rows if row.rewards["answer"] == 1]
  assert right and all(row.prompt.startswith("how many") for row in right)


def test_an_edit_that_changes_nothing_scores_like_the_untouched_picture(monkeypatch, examples):
  untouched = lambda request, settings: pipeline.Result(None, (), True, np.array(request.image))
  rows = _run_task(monkeypatch, "edit", examples, untouched)
  assert all(row.rewards == {"edit": 0.0, "untouched": 0.0} for row in rows)
  for example in examples:
    picture = renderer.render(example.scene, np.random.default_rng(0))
    assert iconworld_tasks._shows(picture, example.scene)
    larger = picture.repeat(2, axis=0).repeat(3, axis=1)
    assert iconworld_tasks._shows(larger, example.scene)
  assert {row.category for row in rows} <= {"make", "remove", "replace", "swap", "add"}


QUICK = ["--num_timesteps=2", "--max_tokens=8", "--batch_size=2"]


def test_a_prompt_file_is_drawn_without_rewards(golden, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS", 0.0)
  path = tmp_path / "mine.jsonl"
  # The first asks for what IconWorld has, in GenEval's format: of another set all the same.
  kite = {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "red"}]}
  path.write_text("".join(json.dumps(line) + "\n" for line in (
    kite | {"prompt": "a red kite"}, {"prompt": "two birds"}, {"prompt": "three"},
  )))
  evaluate.main([
    f"--checkpoint={golden}", f"--prompts_from={path}", f"--out={tmp_path / 'out'}", "--prompts=2",
    "--modes", "plain", "--keep=1", "--size", "32", "48", *QUICK,
  ])
  record = json.loads((tmp_path / "out/results.json").read_text())
  assert [row["prompt"] for row in record["rows"]] == ["a red kite", "two birds"]
  assert all(row["rewards"] == {} for row in record["rows"])
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "contact.png", "images", "results.json", "results.md"]
  out, err = capsys.readouterr()
  assert "2 of 2 pictures were not scored" in out and "plain: 2 of 2 pictures" in err


def broken(samples):
  raise RuntimeError("no model")


def test_rewards_of_the_users_own(golden, tmp_path, capsys):
  """Any prompt is scored by them; what one cannot score is reported, not a 0. One that scored
  nothing is an error, once the results are written."""
  path = tmp_path / "mine.txt"
  path.write_text("a red kite\ntwo birds\n")
  with pytest.raises(errors.Unavailable, match="reward mine scored none of 2 pictures"):
    evaluate.main([
      f"--checkpoint={golden}", f"--prompts_from={path}", f"--out={tmp_path / 'out'}",
      "--modes", "plain", "--size", "32", "32", *QUICK,
      "--rewards", "brightness", "mine=tests.test_evaluate:broken",
    ])
  rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
  assert [set(row["rewards"]) for row in rows] == [{"brightness"}, {"brightness"}]
  assert all(0 < row["rewards"]["brightness"] < 1 for row in rows)
  out = capsys.readouterr().out
  assert "reward mine did not score 2 pictures: RuntimeError: no model" in out
  assert "| brightness |" in out and "not scored" not in out


def test_a_killed_evaluation_continues_as_if_it_had_not_been(golden, tmp_path, monkeypatch):
  """Bit for bit: batches that are on disk are not drawn again."""
  path = tmp_path / "mine.jsonl"
  demand = {"tag": "colors", "include": [{"class": "cow", "count": 1}]}
  path.write_text("".join(json.dumps(demand | {"prompt": p}) + "\n" for p in ("a", "two", "x y")))

  def arguments(name, *more):
    return [
      f"--checkpoint={golden}", f"--prompts_from={path}", f"--out={tmp_path / name}", "--samples=2",
      "--modes", "plain", "--size", "32", "32", *QUICK, "--keep=all", "--rewards=brightness",
      f"--keep_official={tmp_path / name}_official", *more,
    ]

  evaluate.main(arguments("whole"))
  add, ran = results.Unfinished.add, []

  def add_one(self, rows):
    if ran:
      raise KeyboardInterrupt
    ran.append(rows)
    add(self, rows)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(results.Unfinished, "add", add_one)
    evaluate.main(arguments("killed"))
  kept = tmp_path / "killed" / "unfinished.jsonl"
  with kept.open("a") as file:
    file.write('[{"mode": "pl')
  (tmp_path / "killed_official/00001/samples/.0000.png.0123abcd").touch()
  message = refusal(evaluate.main, arguments("killed", "--seed=1"))
  assert "holds an unfinished evaluation of seed=0, not 1" in message
  assert kept.read_text().count("\n") == 2
  drawn, run = [], pipeline.Pipeline.run
  monkeypatch.setattr(
    pipeline.Pipeline, "run", lambda self, batch: drawn.append(batch.real) or run(self, batch)
  )
  evaluate.main(arguments("killed"))
  assert drawn == [4]  # The second of two batches, filled up: so many the devices share evenly.
  for name in ("", "_official"):
    files = {
      str(path.relative_to(tmp_path / f"whole{name}")): path
      for path in (tmp_path / f"whole{name}").rglob("*") if path.is_file()
    }
    others = [path for path in (tmp_path / f"killed{name}").rglob("*") if path.is_file()]
    assert len(files) == len(others)
    for file, path in files.items():
      same = path.read_bytes().replace(b"whole", b"killed")
      assert file == "contact.png" or same == (tmp_path / f"killed{name}" / file).read_bytes(), file


def test_a_finished_evaluation_is_replaced_only_where_that_is_asked_for(golden, tmp_path, capsys):
  path = tmp_path / "mine.txt"
  path.write_text("a red kite\n")

  def call(*more):
    evaluate.main([
      f"--checkpoint={golden}", f"--prompts_from={path}", f"--out={tmp_path / 'out'}",
      "--modes", "plain", "--size", "32", "32", *QUICK, "--rewards=brightness", *more,
    ])

  call()
  results_file = tmp_path / "out/results.json"
  before = results_file.read_bytes(), results_file.stat().st_mtime_ns
  capsys.readouterr()
  call()
  assert "holds this evaluation already; --overwrite makes it again" in capsys.readouterr().out
  message = refusal(call, "--seed=1")
  assert "holds a finished evaluation of seed=0, not 1; give another --out, or --over" in message
  again = [f"--images={tmp_path / 'out'}", "--rewards=brightness"]
  evaluate.main([*again, f"--out={tmp_path / 'rated'}"])
  message = refusal(evaluate.main, [f"--images={tmp_path / 'rated'}", "--rewards=brightness",
                                    f"--out={tmp_path / 'out'}"])
  assert "holds a finished evaluation of images_from=None" in message
  capsys.readouterr()
  evaluate.main([*again, f"--out={tmp_path / 'rated'}"])
  assert "holds this evaluation already" in capsys.readouterr().out
  assert before == (results_file.read_bytes(), results_file.stat().st_mtime_ns)
  call("--seed=1", "--overwrite")
  assert json.loads(results_file.read_text())["seed"] == 1
  (tmp_path / "rated/unfinished.jsonl").write_text("{}\n")
  assert "holds an unfinished evaluation" in refusal(evaluate.main, [*again, "--overwrite",
                                                     f"--out={tmp_path / 'rated'}"])


@pytest.mark.parametrize("flags, words", [
  (["--images=a", "--checkpoint=b"], "--checkpoint has no effect with --images; leave it out"),
  (["--images=a", "--temperature=1"], "--temperature has no effect with --images"),
  (["--geneval_results=a", "--rewards", "brightness"], "--rewards has no effect with --geneval_re"),
  (["--temperature=1e-20"], "--temperature=1e-20 must be at least 1e-06, or 0, which takes"),
])
def test_flags_that_would_do_nothing_are_refused(flags, words):
  assert words in refusal(evaluate.main, ["--out=o", *flags])


@pytest.mark.parametrize("changes", [
  {"image": 5}, {"prompt": None}, {"mode": 7}, {"number": "a"}, {"metadata": "x"}, {"rewards": 3},
  {"rewards": {"a": "b"}},
])
def test_results_with_a_member_of_another_kind_are_refused(tmp_path, changes):
  row = dict(mode="plain", category="all", prompt="a", text=None, rewards={}, image=None)
  (tmp_path / "results.json").write_text(json.dumps({"rows": [row | changes]}))
  message = refusal(results.read, tmp_path)
  assert "results.json: not the results of an evaluation (a row has " in message


def test_iconworld_has_rewards_and_tasks(golden, tmp_path, capsys):
  evaluate.main([
    f"--checkpoint={golden}", f"--out={tmp_path}", "--prompts=2", "--modes", "plain", "answer",
    "--keep=0", "--size", "32", "32", "--samples=2",
    f"--keep_official={tmp_path / 'official'}", *QUICK,
  ])
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["mode"] for row in rows] == ["plain"] * 4 + ["answer"] * 2
  assert set(rows[0]["rewards"]) == {"strict", "soft", "geneval", "points"}
  assert set(rows[4]["rewards"]) == {"answer"}
  measured = json.loads((tmp_path / "benchmarks.json").read_text())["plain"]
  assert set(measured) == {"geneval", "strict", "ta"} and measured["ta"]["verifier"]["images"] == 4
  assert sorted(p.name for p in (tmp_path / "official/00001").rglob("*")) == [
    "0000.png", "0001.png", "metadata.jsonl", "samples"]
  assert "| plain |" in capsys.readouterr().out and not (tmp_path / "contact.png").exists()


def test_exam_points_need_a_judge(golden, tmp_path):
  path = tmp_path / "mine.jsonl"
  path.write_text(json.dumps({"prompt": "a red kite", "points": ["it is red"]}) + "\n")
  message = refusal(evaluate.main, [
    f"--checkpoint={golden}", f"--prompts_from={path}", f"--out={tmp_path / 'out'}",
    "--modes", "plain", "--size", "32", "32", *QUICK,
  ])
  assert "has exam points; say who answers them: --rewards ta=judge, or the folder of a" in message


def test_results_of_genevals_own_script_are_summarised(tmp_path, capsys):
  path = tmp_path / "results.jsonl"
  row = {"prompt": "p", "tag": "colors", "metadata": "{}"}
  path.write_text("".join(json.dumps(row | {"correct": c}) + "\n" for c in (True, False)))
  evaluate.main([f"--geneval_results={path}", f"--out={tmp_path / 'out'}"])
  said = capsys.readouterr().out
  assert "Total images: 2, total prompts: 1, % correct images: 50.00%, % correct prompts: " in said
  record = json.loads((tmp_path / "out/benchmarks.json").read_text())
  assert record["official"]["geneval"]["overall"]["mean"] == 0.5


def test_no_picture_of_an_older_evaluation_stays(tmp_path):
  image, row = np.zeros((8, 8, 3), np.uint8), results.Row("plain", "all", "a", None, {}, None)
  rows = [dataclasses.replace(row, image=f"images/plain_0000{i}.png") for i in range(2)]
  other = tmp_path / "images" / "train_00001.png"  # a file of the user's
  other.parent.mkdir()
  other.write_bytes(b"")
  files = lambda: sorted(path.name for path in tmp_path.rglob("*.png"))
  results.Results(rows, {row.image: image for row in rows}).save(tmp_path, "a title")
  assert files() == ["contact.png", "plain_00000.png", "plain_00001.png", "train_00001.png"]
  results.Results([row], {}).save(tmp_path, "a title")
  assert files() == ["train_00001.png"]


@pytest.mark.parametrize(
  "args, words",
  [
    ([], "--out"),
    (["--out=o", "--prompts=0"], "--prompts=0 must be at least 1"),
    (["--out=o", "--num_timesteps=1"], "--num_timesteps=1"),
    (["--out=o", "--cfg_interval", "1", "0"], "LOW < HIGH"),
    (["--out=o", "--modes", "draw"],
     "--modes (which has answer and edit besides): mode='draw' is none of plain"),
    (["--out=o", "--modes", "plain", "plain"], "may be given only once"),
    (["--out=o", "--split=nope"], "split='nope' is none of"),
    (["--out=o", "--prompts_from=nope"], "nope: no such prompt set"),
    (["--out=o", "--prompts_from=p.txt", "--modes", "edit"], "edit needs --prompts_from=iconworld"),
    (["--out=o", "--prompts_from=p.txt", "--modes", "given"], "has no reasoning"),
    (["--out=o", "--prompts_from=p.txt", "--prompts=9"], "--prompts=9: p.txt, split test, has 2"),
    (["--out=o", "--size", "40", "32", "--prompts=1"], "height=40"),
    (["--out=p.txt"], "--out=p.txt is a file"),
    (["--out=p.txt/o"], "--out=p.txt/o: cannot be written to"),
    (["--out=o", "--rewards", "brightnes"], "did you mean 'brightness'?"),
    (["--out=o", "--modes", "edit", "--rewards", "brightness"], "nothing is drawn for --rewards"),
    (["--out=o", "--modes", "edit", "--samples=2"], "--samples has no effect with --modes edit"),
    (["--out=o", "--modes", "answer", "edit", "--size", "8", "8"], "--size has no effect"),
    (["--out=o", "--modes", "answer", "--keep_official=p"], "--keep_official has no effect"),
    (["--out=o", "--reward_options", '{"a": {}}'], "--reward_options needs --rewards"),
    (["--out=o", "--checkpoint=nope"], "nope: no such folder"),
  ],
)
def test_mistakes_give_one_line_before_weights_are_loaded(
  golden, tmp_path, capsys, monkeypatch, args, words
):
  def refuse(*_):
    raise AssertionError("loaded")

  monkeypatch.setattr(pipeline.Pipeline, "load", refuse)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "p.txt").write_text("a\nb\n")
  with pytest.raises(SystemExit) as stop:
    errors.report(lambda: evaluate.main([f"--checkpoint={golden}", *args]))
  line = capsys.readouterr().err
  assert stop.value.code == 2 and line.count("\n") == 1 and words in line
  assert not (tmp_path / "o").exists()


def test_tiny_is_the_embedded_checkpoint(golden, tmp_path, monkeypatch):
  monkeypatch.setattr(folders, "TINY_FOLDER", tmp_path / "nowhere")
  with pytest.raises(errors.InputError, match="tiny: .*nowhere is missing from this installation"):
    folders.open_folder("tiny")
  monkeypatch.setattr(folders, "TINY_FOLDER", golden)
  assert folders.open_folder("tiny").path == golden
  # A folder that happens to have the name is reached by its path.
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.InputError, match="no such folder"):
    folders.open_folder("./tiny")
