"""Scores of pictures that exist: official folders and evaluations, without jax."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors, evaluate, rewards
from unigrpo_jax.benchmarks import evaluation, official, results
from unigrpo_jax.geneval import prompts
from unigrpo_jax.tools import rescore

ROOT = pathlib.Path(__file__).parents[1]


class Green:
  """1 where the rectangle is green; NaN, with a reason, for blue ones."""

  settings = {"detector": "by eye", "threshold": 0.3}

  def __call__(self, samples):
    scores, details = [], []
    for sample in samples:
      assert sample.metadata["prompt"] == sample.prompt
      red, green, blue = sample.image[4, 4]
      scores.append(np.nan if blue else float(green > red))
      details.append({"reason": "blue"} if blue else {"boxes": [[2, 2, 6, 6]]})
    return rewards.Scores(np.array(scores), "blue", details=details)


def draw(folder, number, samples):
  """The first `number` of GenEval's prompts: image k of prompt i is right where k < i % 5."""
  metadata = prompts.official()[:number]
  official.begin(folder, metadata, samples)
  for i in range(number):
    for k in range(samples):
      image = np.full((8, 8, 3), 255, np.uint8)
      image[2:6, 2:6] = (0, 200, 0) if k < i % 5 else (200, 0, 0)
      official.write_image(folder, i, k, image)


def score(folder, out, *more):
  evaluate.main([f"--images={folder}", f"--out={out}", "--rewards=geneval=tests.test_rescore:Green",
                 *more])
  return (out / "results.md").read_text(), json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("number, samples", [
  (9, 2), pytest.param(553, 4, marks=pytest.mark.slow),
])
def test_an_official_folder_gives_the_same_table_twice(tmp_path, capsys, number, samples):
  draw(tmp_path / "pictures", number, samples)
  text, record = score(tmp_path / "pictures", tmp_path / "once")
  assert score(tmp_path / "pictures", tmp_path / "twice") == (text, record)
  right = [min(i % 5, samples) for i in range(number)]
  assert f"| mean of images | {sum(right) / number / samples:.4f} |" in text
  assert f"total prompts: {number}, " in text and f"Total images: {number * samples}, " in text
  assert f"% correct prompts: {np.mean(np.array(right) > 0):.2%}" in text
  assert "geneval: detector=by eye, threshold=0.3\n" in text and "best of N" in text
  tags = [metadata["tag"] for metadata in prompts.official()[:number]]
  means = [
    np.mean([r / samples for r, of in zip(right, tags) if of == tag]) for tag in dict.fromkeys(tags)
  ]
  assert f"| overall (mean of tags) | {np.mean(means):.4f} |" in text
  assert record["settings"] == {"geneval": Green.settings}
  row = record["rows"][samples]
  assert (row["number"], row["k"], row["image"]) == (1, 0, "../pictures/00001/samples/0000.png")
  assert row["details"] == {"geneval": {"boxes": [[2, 2, 6, 6]]}}
  # What was scored again can be scored again.
  again = score(tmp_path / "once", tmp_path / "deeper" / "again")
  assert again[0].split("## ", 1)[1] == text.split("## ", 1)[1]


def test_an_evaluation_is_scored_again(tmp_path, capsys):
  """Of any mode, with reasonings, also an unfinished one; pictures that were not kept are left out.
  """
  metadata = prompts.official()[0]
  rows = [
    results.Row(
      "think + guidance", "single_object", metadata["prompt"], "<think>so", {"other": 1.0},
      "images/think_guidance_00000.png" if k else None, 0, k, metadata=metadata,
    ) for k in (0, 1)
  ]
  blue = np.zeros((8, 8, 3), np.uint8) + np.array([0, 0, 9], np.uint8)
  results.Pictures(tmp_path / "eval")[rows[1].image] = blue
  unfinished = results.Unfinished(tmp_path / "eval", {"of": "a model", "prompts_from": "geneval"})
  unfinished.begin()
  unfinished.add(rows)
  with pytest.raises(errors.Unavailable, match="reward geneval scored none of 1 pictures"):
    score(tmp_path / "eval", tmp_path / "out")
  text = (tmp_path / "out/results.md").read_text()
  [row] = json.loads((tmp_path / "out/results.json").read_text())["rows"]
  assert row["rewards"] == {} and row["details"] == {"geneval": {"reason": "blue"}}
  assert row["text"] == "<think>so" and row["mode"] == "think + guidance"
  assert "| single_object |  |  | 0 | 0 | 0 | 0 | 1 |" in text
  assert "Total images: 0, total prompts: 0, Overall: none was judged" in text
  said = capsys.readouterr().out
  assert "reward geneval did not score 1 pictures: blue" in said
  assert "1 of 2 pictures were not kept" in said
  assert text.startswith("# a model, scored again of ")
  # Without --rewards only IconWorld's have some.
  message = refusal(evaluate.main, [f"--images={tmp_path / 'eval'}", f"--out={tmp_path / 'o'}"])
  assert "needs --rewards" in message


def test_other_prompts_of_the_same_pictures_are_another_evaluation(tmp_path, capsys):
  draw(tmp_path / "pictures", 2, 1)
  flags = [f"--images={tmp_path / 'pictures'}", f"--out={tmp_path / 'out'}", "--rewards=brightness"]
  evaluate.main(flags)
  evaluate.main(flags)
  assert "holds this evaluation already" in capsys.readouterr().out
  record = tmp_path / "pictures/00001/metadata.jsonl"
  record.write_text(record.read_text().replace("}", ', "corrected": 1}', 1))
  assert "--overwrite" in refusal(evaluate.main, flags)
  evaluate.main([*flags, "--overwrite"])


def test_jax_is_not_imported(tmp_path):
  draw(tmp_path / "pictures", 2, 1)
  program = (
    "import sys; sys.modules['jax'] = None\n"
    "from unigrpo_jax import evaluate\n"
    f"evaluate.main(['--images={tmp_path / 'pictures'}', '--out={tmp_path / 'out'}', '--rewards', "
    "'brightness', 'geneval=jpeg_size'])\n"
    "assert not [name for name in sys.modules if name.startswith(('jax.', 'flax'))]"
  )
  subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)
  assert (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("more, words", [
  (["--samples=2"], "--samples has no effect with --images"),
  (["--modes", "plain"], "--modes has no effect with --images"),
  (["--prompts_from=a.jsonl"], "--prompts_from has no effect with --images"),
  (["--split=train"], "--split has no effect with --images"),
  (["--keep=all"], "--keep has no effect with --images"),
  (["--seed=7"], "--seed has no effect with --images"),
  (["--geneval_results=x"], "--images and --geneval_results: give one"),
])
def test_what_does_not_go_with_pictures_is_refused(tmp_path, more, words):
  arguments = [f"--images={tmp_path}", f"--out={tmp_path / 'o'}", "--rewards=brightness", *more]
  assert words in refusal(evaluate.main, arguments)


def test_other_folders_are_refused(tmp_path):
  call = lambda folder, out="out": refusal(
    evaluate.main, [f"--images={tmp_path / folder}", f"--out={tmp_path / out}",
                    "--rewards=brightness"])
  assert "no such folder" in call("nowhere")
  arguments = ["--images=4", f"--out={tmp_path / 'out'}", "--rewards=brightness"]
  assert "--samples is how many images" in refusal(evaluate.main, arguments)
  (tmp_path / "empty").mkdir()
  assert "neither results of unigrpo_jax.evaluate nor" in call("empty")
  draw(tmp_path / "pictures", 2, 1)
  assert "give another folder" in call("pictures", "pictures")
  (tmp_path / "pictures/00001/metadata.jsonl").write_text("{}\n{}\n")
  assert "metadata.jsonl" in call("pictures")
  (tmp_path / "pictures/00001/metadata.jsonl").unlink()
  assert "00001/metadata.jsonl: cannot be read" in call("pictures")


def test_seeds_of_pictures_never_overlap():
  seeds = {
    evaluation.image_seed(7, i, k) for i in (0, 1, 552, evaluation.MOST_PROMPTS - 1)
    for k in (0, 1, 3, evaluation.MOST_IMAGES - 1)
  }
  assert len(seeds) == 16 and max(seeds) < 2**32 and evaluation.image_seed(7, 5, 2) == 12 + 2**21


@pytest.mark.parametrize("name", ["unfinished.jsonl", "results.json"])
@pytest.mark.parametrize("rows", ["5", "null", "[5]", '[{"a": 1}]', "[" * 100_000])
def test_damaged_results_are_named_in_a_line(tmp_path, name, rows):
  text = '{"of": "x"}\n' + rows + "\n"
  (tmp_path / name).write_text(text if name == "unfinished.jsonl" else '{"rows": ' + rows + "}")
  with pytest.raises(errors.InputError, match=name):
    results.read(tmp_path)
  (tmp_path / name).write_text("null\n[]\n" if name == "unfinished.jsonl" else "null")
  with pytest.raises(errors.InputError, match=name):
    results.read(tmp_path)


def test_what_is_waited_for_is_named(monkeypatch, capsys):
  def slow(samples):
    time.sleep(0.5)
    return [1.0] * len(samples)

  monkeypatch.setattr(rescore, "WAITING_SECONDS", 0.1)
  one = rewards.Scorer({"taste": slow}, {"taste": 1.0})
  scores = rescore.wait(one.submit([rewards.Sample("", np.zeros((1, 1, 3), np.uint8))]))
  assert scores["taste"].values == [1]
  assert "waiting for reward taste, after 0 s\n" in capsys.readouterr().err
  one.close()
