"""The embedded BAGEL, served, judges what it draws itself: in training and in an evaluation."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from unigrpo_jax.iconworld import prompts, riddles

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def points(metadata):
  """Questions that the embedded BAGEL knows, with their answers and needs."""
  made = []
  for entry in metadata["include"]:
    noun = riddles.PLURALS[entry["class"]]
    made.append(
      {"question": f"how many {noun} are there?", "answer": riddles.NUMBERS[entry["count"]]}
    )
    if entry["count"] == 1 and "color" in entry:
      made.append({
        "question": f"what colour is the {entry['class']}?", "answer": entry["color"],
        "needs": [len(made)],
      })
  return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("judge")
  lines = [
    json.dumps({"prompt": example.prompt, "tag": example.metadata["tag"],
                "points": points(example.metadata)})
    for example in prompts.fixed("test", 12)
  ]
  (folder / "exam.jsonl").write_text("\n".join(lines) + "\n")
  (folder / "question.txt").write_text("{question}\n")
  return folder


@pytest.fixture(scope="module")
def url():
  process = subprocess.Popen(
    [sys.executable, "-m", "unigrpo_jax.serve", "--checkpoint=tiny", "--port=0", "--max_tokens=8"],
    cwd=ROOT, stdout=subprocess.PIPE, text=True,
  )
  try:
    line = process.stdout.readline()
    assert line.startswith("serving tiny on http://127.0.0.1:"), line
    yield f"{line.split()[-1]}/v1"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "stopped\n" and process.returncode == 0
  finally:
    process.kill()
    process.wait()


def run(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=3000,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout + done.stderr


def options(files, url, **more):
  # It was never asked whether a square is red, so the probe is off.
  return {"url": url, "template": str(files / "question.txt"), "probe": False, **more}


def test_five_iterations_of_training(files, url, tmp_path):
  run(
    "unigrpo_jax.train", "--config=configs/unigrpo.py:tiny", f"--workdir={tmp_path}",
    f"--config.prompts.source={files / 'exam.jsonl'}", "--config.steps=5",
    "--config.prompts_per_step=4", "--config.rollout.prompts_at_once=4", "--config.group_size=4",
    "--config.microbatch=16", "--config.eval.every=0", "--config.rewards={'judge': 1.0}",
    f"--config.reward_options={ {'judge': options(files, url)} }",
  )
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  scores = [row["reward/judge"] for row in rows if "reward/judge" in row]
  assert len(scores) == 5 and all(0 <= score <= 1 for score in scores)
  assert np.std(scores) > 0 and np.mean(scores) > 0.2  # Of a model that can draw and count.


def test_an_evaluation(files, url, tmp_path):
  given = json.dumps({"ta": options(files, url)})
  run(
    "unigrpo_jax.evaluate", "--checkpoint=tiny", f"--prompts_from={files / 'exam.jsonl'}",
    "--modes", "plain", f"--out={tmp_path}", "--rewards", "ta=judge", f"--reward_options={given}",
  )
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert len(rows) == 12
  scores = [row["rewards"]["ta"] for row in rows]
  made = json.loads((tmp_path / "benchmarks.json").read_text())["plain"]["ta"]["ta"]
  assert made["images"] == 12 and made["ta"]["mean"] == pytest.approx(np.mean(scores))
  assert (tmp_path / "ta_answers.jsonl").stat().st_size > 0
