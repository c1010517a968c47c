"""The comparison: rows, jobs, tables by hand, what is only read, and what signals do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.refusals import refusal
from unigrpo_jax.benchmarks import verdict
from unigrpo_jax.tools.compare import command, comparison, figures, methods, processes, runs, scores

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = 12  # two a category
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


# --- Runs and evaluations as they lie in a folder.

def _write_run(training, rewards):
  """A finished run: its log, its configuration and the folders of its checkpoints."""
  folder = training.folder
  folder.mkdir(parents=True)
  rows = [{"step": step, f"eval/{training.mode}/reward": value} for step, value in rewards.items()]
  rows.insert(1, {"step": 1, "reward/mean": 0.5, "flow/mse": 0.1})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "config.json").write_text(json.dumps(training.settings))
  for step in rewards:
    if step:
      (folder / "checkpoints" / str(step)).mkdir(parents=True)


def _write_evaluation(folder, modes, score, images=2):
  """`score(prompt, k)` is the verdict, and the share of points."""
  rows = [
    {"mode": mode, "category": CATEGORIES[p % 6], "prompt": f"p{p}", "text": None, "image": None,
     "rewards": dict.fromkeys(("iconworld_geneval", "iconworld_points"), float(score(p % 6, k)))
     | {"iconworld_strict": 0.0, "reward_model": 0.5}, "number": p, "k": k}
    for mode in modes for p in range(PROMPTS) for k in range(images)
  ]
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps({"rows": rows}))


def _comparison(
  workdir, names=("TextGRPO", "UniGRPO"), seeds=(0, 1), sweep=False, bagel="", overrides=()
):
  return comparison.Comparison(
    workdir, names=names, seeds=seeds, variants="tiny", start="tiny", bagel=bagel, sweep=sweep,
    benchmark=scores.Benchmark(PROMPTS, PROMPTS, 2, 0, ""),
    overrides=["--config.steps=4", "--config.eval.every=2", *overrides],
  )


ALL_MODES = ("plain", "plain + guidance", "think", "think + guidance")


def _finish(made, workdir, name, seed, rewards, score):
  training = made.training(name, seed)
  _write_run(training, rewards)
  for which in ("last", "best"):
    model = workdir / "models" / f"{training.folder.name}_{which}"
    model.parent.mkdir(exist_ok=True)
    if which == "last" or training.step("best") != training.step("last"):
      model.symlink_to(ROOT / "unigrpo_jax/assets/tiny_bagel")
      _write_evaluation(
        workdir / "evaluations" / f"{model.name}_{PROMPTS}x2_0", ALL_MODES, score)


# --- Methods and rows.

def test_the_rows_are_the_papers_in_its_order():
  shown = [
    (row.name, methods.ALL[row.trained].thinks if row.trained in methods.ALL else None, row.thinks)
    for row in methods.ROWS
  ]
  assert shown == [
    ("Bagel", None, False), ("Bagel", None, True), ("SFT", None, False), ("SFT", None, True),
    ("ReFL", False, False), ("ReFL", False, True), ("FPO", False, False), ("FPO", False, True),
    ("FlowGRPO", False, False), ("FlowGRPO", False, True), ("TextGRPO", True, True),
    ("ReFL (w/ Thinking)", True, True), ("… + TextGRPO", True, True), ("UniFPO", True, True),
    ("UniGRPO", True, True),
  ]
  # Rows 5 to 10 share their checkpoints by pairs.
  assert [row.trained for row in methods.ROWS[4:10:2]] == [r.trained for r in methods.ROWS[5:10:2]]
  assert methods.with_starts(["UniGRPO", methods.REFL_TEXT]) == [
    "UniGRPO", methods.REFL_THINK, methods.REFL_TEXT]
  assert len({methods.slug(name) for name in methods.ALL}) == len(methods.ALL)


@pytest.mark.parametrize("name", list(methods.ALL))
def test_every_method_has_a_config_that_evaluates_it(name, tmp_path):
  method = methods.ALL[name]
  training = runs.prepare(
    name, 3, folder=tmp_path / "r", init_from="tiny", variants="tiny", shared=(),
    overrides=["--config.steps=10"],
  )
  assert training.settings["rollout"]["think"] == method.thinks and training.settings["seed"] == 3
  assert training.steps == 10 * method.share
  assert training.settings["eval"]["modes"][0] == ("think" if method.thinks else "plain")


def test_a_sweep_scales_all_learning_rates(tmp_path):
  rates = [
    runs.prepare("UniGRPO", 0, folder=tmp_path, init_from="tiny", variants="tiny", shared=(),
                 rate=rate).settings["learning_rate"]
    for rate in (1.0, 3.0)
  ]
  assert {group: pytest.approx(3 * rate) for group, rate in rates[0].items()} == rates[1]


# --- What is left to do.

def test_jobs_are_what_is_not_done(tmp_path):
  made = _comparison(tmp_path)
  names = lambda: [job.name for job in made.jobs()]
  assert names() == [
    "SFT", "TextGRPO, seed 0", "UniGRPO, seed 0", "TextGRPO, seed 1", "UniGRPO, seed 1"]
  _write_run(made.training("TextGRPO", 0), {0: 0.4, 2: 0.6, 4: 0.5})
  assert names()[:3] == [
    "SFT", "TextGRPO, seed 0: last checkpoint", "TextGRPO, seed 0: best checkpoint"]
  export, evaluate = made.jobs()[2].commands
  assert "--step=2" in export and "--dtype=float32" in export
  modes = evaluate[evaluate.index("--modes") + 1 : evaluate.index("--rewards")]
  assert modes == ["think+guidance", "think"]  # its rows are with thinking
  # Where the last is the best, it is evaluated once.
  _write_run(made.training("UniGRPO", 0), {0: 0.4, 2: 0.5, 4: 0.5})
  assert "UniGRPO, seed 0: best checkpoint" not in names()


def test_a_method_waits_for_what_it_starts_from(tmp_path, monkeypatch):
  first, second = (methods.Method("text_grpo", True, start=start) for start in ("", "A"))
  monkeypatch.setattr(methods, "ALL", methods.ALL | {"A": first, "B": second})
  made = _comparison(tmp_path, names=["B"], seeds=[0])
  ready = lambda: {job.name: job.ready for job in made.jobs()}
  assert ready() == {"SFT": True, "A, seed 0": True, "B, seed 0": False}
  _write_run(made.training("A", 0), {4: 0.5})
  assert ready() == {"SFT": True, "A, seed 0: last checkpoint": True, "B, seed 0": False}
  model = tmp_path / "models" / "a_0_last"
  model.parent.mkdir()
  model.symlink_to(ROOT / "unigrpo_jax/assets/tiny_bagel")
  assert ready() == {"SFT": True, "B, seed 0": True}
  assert made.training("B", 0).settings["init_from"] == str(model)


def test_a_sweep_chooses_by_validation_alone(tmp_path):
  made = _comparison(tmp_path, names=["TextGRPO"], sweep=True)
  jobs = made.jobs()
  assert [job.name for job in jobs if job.ready] == [
    "SFT", *(f"TextGRPO, seed 0, learning rates x {f}" for f in ("0.333", "1", "3"))]
  assert [job.name for job in jobs if not job.ready] == ["TextGRPO, seed 1"]
  for rate, reward in zip(comparison.FACTORS, (0.4, 0.5, 0.7)):
    assert made.chosen("TextGRPO") is None
    _write_run(made._prepare("TextGRPO", 0, rate), {4: reward})
  assert made.chosen("TextGRPO") == 3.0
  # The sweep's own run is that of its seed.
  assert [job.name for job in made.jobs() if "best" not in job.name] == [
    "SFT", "TextGRPO, seed 0: last checkpoint", "TextGRPO, seed 1"]
  sweep = made.record()["sweep"]["TextGRPO"]
  assert sweep == {"rewards": {"0.333333": 0.4, "1": 0.5, "3": 0.7}, "chosen": 3.0}
  assert "| TextGRPO | 0.400 | 0.500 | 0.700 | x 3 |" in made.write()


def test_a_sweep_goes_on_without_a_rate_that_diverged(tmp_path):
  made = _comparison(tmp_path, names=["TextGRPO"], sweep=True)
  names = lambda: [job.name for job in made.jobs()]
  for rate, reward in ((1 / 3, 0.4), (1.0, 0.5)):
    _write_run(made._prepare("TextGRPO", 0, rate), {4: reward})
  assert made.chosen("TextGRPO") is None
  last = "TextGRPO, seed 0, learning rates x 3"
  assert last in names()
  made.failed[last] = "error: the disk is full"
  assert made.chosen("TextGRPO") is None  # The same command may do better.
  made.failed[last] = "error: step 3: grad_norm/gen not finite; lower the learning rate"
  assert made.chosen("TextGRPO") == 1.0 and "TextGRPO, seed 1" in names()
  assert "| TextGRPO | 0.400 | 0.500 | – | x 1 |" in made.write()


# --- The tables.

def test_the_page_says_whose_iterations_and_whose_reward(tmp_path):
  """Those of the methods that share a budget; and what chose the best checkpoint."""
  made = _comparison(tmp_path, names=["UniGRPO", methods.REFL_LONG], seeds=[0])
  assert made.record()["iterations"] == 4
  _finish(made, tmp_path, "UniGRPO", 0, {2: 0.7, 4: 0.6}, lambda p, k: 1)
  text = made.write()
  assert "## Table 1: best checkpoint by the reward on validation, with guidance" in text
  assert _comparison(tmp_path, names=[methods.REFL_LONG], seeds=[0]).record()["iterations"] == 12


def test_the_tables_by_hand(tmp_path):
  made = _comparison(tmp_path)
  _write_evaluation(tmp_path / "evaluations" / f"sft_{PROMPTS}x2_0", ALL_MODES, lambda p, k: p == 0)
  for seed in (0, 1):
    _finish(made, tmp_path, "UniGRPO", seed, {2: 0.5, 4: 0.6}, lambda p, k: p < 3)
  # Seed 0: the first two prompts; seed 1: one image each of the first four.
  _finish(made, tmp_path, "TextGRPO", 0, {2: 0.7, 4: 0.6}, lambda p, k: p < 2)
  _finish(made, tmp_path, "TextGRPO", 1, {2: 0.5, 4: 0.6}, lambda p, k: p < 4 and k)
  text = made.write()
  record = json.loads((tmp_path / "results.json").read_text())
  key = "last, with guidance"
  rows = {row["name"]: row for row in record["rows"]}
  got = rows["TextGRPO"]["scores"][key]
  # m_p over both seeds: 3/4, 3/4, 1/4, 1/4, 0, 0, twice.
  assert got["ta"]["mean"] == pytest.approx(1 / 3)
  assert got["ta"]["se"] == pytest.approx(0.325669 / 12**0.5, rel=1e-5)
  assert got["by_seed"]["ta"] == pytest.approx([1 / 3, 1 / 3])
  assert got["across_seeds"]["ta"] == pytest.approx({"mean": 1 / 3, "half": 0})
  # Prompt by prompt to UniGRPO's 1, 1, 1, 0, 0, 0.
  assert got["difference"]["ta"]["mean"] == pytest.approx(-1 / 6)
  assert got["geneval"]["mean"] == pytest.approx(1 / 3) and got["strict"]["mean"] == 0
  assert [got["categories"][c]["mean"] for c in CATEGORIES] == [0.75, 0.75, 0.25, 0.25, 0, 0]
  assert "difference" not in rows["UniGRPO"]["scores"][key]
  assert "best, with guidance" in rows["TextGRPO"]["scores"]
  # What the numbers are of.
  for seed, part in enumerate(rows["TextGRPO"]["checkpoints"]["last"]):
    assert part["seed"] == seed and part["step"] == 4 and part["noise_seed"] == 0
    assert len(part["checkpoint"]) >= 16 and len(part["config"]) == 16
  assert rows["TextGRPO"]["checkpoints"]["best"][0]["step"] == 2
  lines = [line for line in text.splitlines() if line.startswith("| 1")]
  assert lines[0].startswith("| 1 | Bagel * | – | – | no | – | – | – |")
  assert lines[2].startswith("| 11 | TextGRPO | SFT | yes | yes | 0.333 ± 0.184 | 0.333 ± 0.000 |")
  assert "| -0.167 ± " in lines[2] and "| 3 | SFT | Bagel | – | no | 0.167 ± " in text
  assert "- Bagel: no folder of the model before supervised training (--bagel)" in text
  assert "- FPO: not among --methods" in text
  assert "- UniGRPO:" not in text and "2 of 2" not in text


def test_the_page_has_the_learned_rewards_agreement_and_what_regularisers_cost(tmp_path):
  names = ["UniGRPO", "UniGRPO without regulariser"]
  made = _comparison(tmp_path, names=names, seeds=[0])
  sft = tmp_path / "evaluations" / f"sft_{PROMPTS}x2_0"
  _write_evaluation(sft, ALL_MODES, lambda p, k: 1)
  of = {"accuracy": [0.75, 0.7, 0.8], "kappa": [0.5, 0.4, 0.6], "answers": 40}
  (sft / "benchmarks.json").write_text(json.dumps({"plain": {"ta": {"agreement": of}}}))
  for name, strict in zip(names, (0.5, 0.25)):
    training = made.training(name, 0)
    _write_run(training, {0: 0.1, 4: 0.6})
    log = training.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row | {f"eval/{training.mode}/iconworld_strict": strict} for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
  text = made.write()
  assert "| plain | 0.750 (0.700 to 0.800) | 0.500 (0.400 to 0.600) | 40 |" in text
  # Where all answers are the same there is no kappa.
  of |= {"accuracy": [1.0, None, None], "kappa": [None, None, None]}
  (sft / "benchmarks.json").write_text(json.dumps({"plain": {"ta": {"agreement": of}}}))
  assert "| plain | 1.000 | – | 40 |" in made.write()
  assert "that training with each of them reached: velocity MSE 0.500, none 0.250." in text


def test_rows_below_the_rule(tmp_path):
  made = _comparison(tmp_path, names=["UniGRPO", "UniGRPO, latent KL"], seeds=[0])
  _finish(made, tmp_path, "UniGRPO", 0, {4: 0.6}, lambda p, k: 1)
  text = made.write()
  lines = text.splitlines()
  rule = next(i for i, line in enumerate(lines) if "further rows" in line)
  assert lines[rule - 1].startswith("| 15 | UniGRPO |")
  assert [line.split(" | ")[1] for line in lines[rule + 1 :][:1]] == ["UniGRPO, latent KL *"]
  assert "- UniGRPO, latent KL: 0 of 1 seeds are finished" in text


def test_a_row_that_diverged_has_dashes_and_says_why(tmp_path, monkeypatch):
  made = _comparison(tmp_path, names=["UniFPO", "UniGRPO"])
  for name in ("UniFPO", "UniGRPO"):
    for seed in (0, 1):
      _finish(made, tmp_path, name, seed, {0: 0.5, 4: 0.5}, lambda p, k: 1)
  fine = verdict.Verdict(False, None, "")
  verdicts = {"unifpo_0": verdict.Verdict(True, 3, "bd"), "unifpo_1": fine}
  monkeypatch.setattr(verdict, "read_rows", lambda folder, mode: folder.name)
  monkeypatch.setattr(verdict, "verdict", lambda name, rejected: verdicts[name])
  text = made.write()
  assert "| 14 | UniFPO * | SFT | yes | yes | – | – | – |" in text
  assert "- UniFPO: 1 of 2 seeds diverged, at iterations 3, by (b; d)" in text
  verdicts["unifpo_0"] = fine
  assert "| 14 | UniFPO | SFT | yes | yes | 1.000 ± " in made.write()
  # A run that ended with a number that is not finite has no last checkpoint to evaluate.
  seen = []
  monkeypatch.setattr(
    verdict, "verdict", lambda name, rejected: seen.append(rejected) or verdicts[name])
  made.failed["UniFPO, seed 1"] = "error: step 7: flow/mse is not finite; the state is saved"
  made.write()
  assert seen[:2] == [None, 7]


def _write_validation(training, step, reward, right):
  """A saved evaluation of four prompts, of which the first `right` are drawn as asked."""
  rows = [
    {"mode": "think", "category": "", "prompt": f"p{p}", "text": None, "image": None, "number": p,
     "rewards": {"reward": reward, "iconworld_strict": float(p < right)}} for p in range(4)
  ]
  folder = training.folder / "evaluations" / f"{step:06d}"
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps({"rows": rows}))


def test_the_table_says_from_when_the_reward_was_hacked(tmp_path):
  """By hand: 3 of 4, then 0 of 4 with no width, at the highest reward."""
  learned = "--config.rewards={'iconworld_soft': 1.0, 'iconworld_strict': 0.0}"
  made = _comparison(tmp_path, seeds=[0, 1], overrides=[learned])
  for seed, last in ((0, 0), (1, 3)):
    training = made.training("UniGRPO", seed)
    _write_run(training, {0: 0.4, 4: 0.6})
    _write_validation(training, 0, 0.4, 3)
    _write_validation(training, 4, 0.6, last)
  lines = made.write().splitlines()
  assert "## The learned reward and the verifier" in lines
  assert (
    "| UniGRPO | 0 | 4 | 0.400 → 0.600 | 0.750 | 0.750 (0) | 0.000 (4) | 0.000 (4) | 0.500 → – | "
    "– → 1.000 | 0.350 → 0.600 |" in lines
  )
  assert any(line.startswith("| UniGRPO | 1 | – | 0.400 → 0.600 | 0.750 |") for line in lines)
  record = json.loads((tmp_path / "results.json").read_text())["hacking"]["UniGRPO"]["0"]
  assert record["onset"] == 4 and [one["step"] for one in record["evaluations"]] == [0, 4]
  # Where the verifier's score is a part of the reward, it is no witness.
  (tmp_path / "own").mkdir()
  own = _comparison(tmp_path / "own", seeds=[0])
  _write_run(own.training("UniGRPO", 0), {0: 0.4, 4: 0.6})
  _write_validation(own.training("UniGRPO", 0), 0, 0.4, 3)
  assert "verifier" not in own.write()


def test_figures_are_drawn_of_what_is_recorded(tmp_path):
  made = _comparison(tmp_path, names=["UniGRPO", methods.REFL_LONG], seeds=[0])
  for name in ("UniGRPO", methods.REFL_LONG):
    training = made.training(name, 0)
    _write_run(training, {0: 0.4, training.steps: 0.6})
  drawn = made.draw()
  assert [path.name for path in drawn] == ["figure3.png", "hacking.png"]
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_curves_of_seeds_that_are_still_trained_wait(tmp_path, monkeypatch):
  made, seen = _comparison(tmp_path, names=["UniGRPO", "TextGRPO"]), []
  monkeypatch.setattr(figures, "learning", lambda logged, *method: seen.append(logged))
  for name, seed, last in (("UniGRPO", 0, 4), ("UniGRPO", 1, 2), ("TextGRPO", 1, 2)):
    _write_run(made.training(name, seed), {0: 0.4, last: 0.6})
  made.draw()
  assert {name: list(of) for name, of in seen[0].items()} == {"UniGRPO": ["0"], "TextGRPO": ["1"]}


def test_curves_have_what_the_runs_logged(tmp_path):
  made = _comparison(tmp_path)
  _write_run(made.training("UniGRPO", 1), {0: 0.4, 2: 0.5, 4: 0.6})
  made.write()
  curves = json.loads((tmp_path / "curves.json").read_text())
  assert list(curves) == ["UniGRPO"] and list(curves["UniGRPO"]) == ["1"]
  run = curves["UniGRPO"]["1"]
  assert run["validation"] == {"think": {"reward": [[0, 0.4], [2, 0.5], [4, 0.6]]}}
  assert run["training"] == {"mean": [[1, 0.5]]} and run["flow_mse"] == [[1, 0.1]]
  assert run["velocity_evaluations"] == 16 * 12 * 12


# --- The command.

ARGUMENTS = ["--methods", "TextGRPO", "--seeds", "5", "--config.steps=3", f"--prompts={PROMPTS}",
             f"--ta_prompts={PROMPTS}", "--samples=2", "--reward_model=", "--config.eval.every=3"]


def _finished(tmp_path):
  folder = tmp_path / "runs" / "textgrpo_5"
  training = runs.prepare(
    "TextGRPO", 5, folder=folder, init_from="tiny", variants="tiny", shared=comparison.VALIDATION,
    overrides=["--config.steps=3", "--config.eval.every=3"])
  _write_run(training, {0: 0.4, 3: 0.5})
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "textgrpo_5_last").symlink_to(ROOT / "unigrpo_jax/assets/tiny_bagel")
  for name in ("textgrpo_5_last", "sft"):
    _write_evaluation(
      tmp_path / "evaluations" / f"{name}_{PROMPTS}x2_0", ALL_MODES, lambda p, k: p < 3)


def test_a_finished_comparison_is_only_read(tmp_path, monkeypatch, capsys):
  _finished(tmp_path)
  monkeypatch.setattr(subprocess, "Popen", None)
  command.main([f"--workdir={tmp_path}", *ARGUMENTS])
  assert "| 11 | TextGRPO | SFT | yes | yes | 0.500 ± " in capsys.readouterr().out
  assert (tmp_path / "results.md").exists()


def test_a_run_of_another_configuration_is_not_read(tmp_path, monkeypatch):
  _finished(tmp_path)
  monkeypatch.setattr(subprocess, "Popen", None)
  arguments = [f"--workdir={tmp_path}", *ARGUMENTS]
  command.main([*arguments, "--config.microbatch=12"])  # changes memory and speed alone
  for override, message in (
    ("text.clip_low=0.1", "textgrpo_5: config.text.clip_low=0.1 but the run"),
    ("learning_rate.und=0.1", "textgrpo_5: config.learning_rate.und=0.1 but the run"),
    ("eval.prompts=9", "textgrpo_5: config.eval.prompts=9 but the run"),
    ("eval.every=0", "TextGRPO is compared by its evaluations with mode think"),
  ):
    assert message in refusal(command.main, [*arguments, f"--config.{override}"])


@pytest.mark.parametrize("arguments, message", [
  (["--methods", "NoGRPO"], "NoGRPO"),
  (["--methods", "UniGRPO", "UniGRPO"], "each may be given only once"),
  (["--seeds"], "--seeds"),
  (["--seeds", "1", "1"], "--seeds 1 1: each may be given only once"),
  (["--seeds=-1"], "--seeds=-1 must be at least 0"),
  (["--jobs=0"], "--jobs=0 must be at least 1"),
  (["--ta_prompts=900"], "--ta_prompts=900 must be"),
  (["--bagel=nowhere"], "--bagel=nowhere"),
  (["--start=nowhere"], "--start=nowhere"),
  (["--variants=tinny"], "'tinny' is none of"),
  (["--config.flow.wieght=1"], "no key 'wieght'"),
  (["--config.steps=0"], "config.steps=0 must be at least 1"),
  (["--config.flow.weight=two"], "--config.flow.weight=two"),
  (["--config=configs/sft.py"], "--config=configs/sft.py"),
  (["--set", "steps=3"], "Unknown command line flag 'set'"),
  (["--methods", "ReFL"], "needs a reward with a gradient"),
  (["--reward_model=nowhere"], "--reward_model=nowhere: nowhere: has no reward.json"),
  (["--config.eval.modes=('plain',)"], "the comparison sets config.eval.modes"),
  (["--config.init_from=x"], "the comparison sets config.init_from; give --start"),
  (["--reward_model=x", "--config.rewards={'brightness': 1.0}"],
   "sets config.rewards; it is of --reward_model"),
])
def test_mistakes_are_found_before_anything_is_trained(tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(subprocess, "Popen", None)
  if "--methods" not in arguments:
    arguments = ["--methods", "UniGRPO", *arguments]
  if not any(argument.startswith("--reward_model") for argument in arguments):
    arguments = [*arguments, "--reward_model="]
  assert message in refusal(command.main, [f"--workdir={tmp_path / 'w'}", *arguments])
  assert not (tmp_path / "w").exists()


# --- Processes.

def _job(folder, name, *codes, ready=True):
  commands = [[sys.executable, "-c", code] for code in codes]
  return processes.Job(name, commands, folder / f"{name}.log", 1.0, ready)


def _run(folder, jobs, cores=(None, None), failed=None):
  """Runs jobs, each of which is done when its folder's file NAME is there."""
  left = lambda: [job for job in jobs if not (folder / job.name).exists()]
  return processes.run(
    left, cores=cores, environment=os.environ, on_end=lambda: None, failed=failed
  )


def _touch(folder, name):
  return f"import pathlib; pathlib.Path({str(folder / name)!r}).touch()"


def test_jobs_run_beside_each_other_and_a_failure_stops_no_other(tmp_path, capsys):
  meet = (
    "import pathlib, time\n"
    f"folder = pathlib.Path({str(tmp_path)!r})\n"
    "(folder / ME).touch()\n"
    "while not (folder / OTHER).exists(): time.sleep(0.01)\n"
  )
  jobs = [
    _job(tmp_path, "a", meet.replace("ME", "'ma'").replace("OTHER", "'mb'"), _touch(tmp_path, "a")),
    _job(tmp_path, "b", meet.replace("ME", "'mb'").replace("OTHER", "'ma'"), _touch(tmp_path, "b")),
    _job(tmp_path, "bad", "import sys; print('error: a key'); sys.exit(2)"),
    _job(tmp_path, "empty", "print('hm')"),
    _job(tmp_path, "waits", "1 / 0", ready=False),
  ]
  seen = {}
  assert _run(tmp_path, jobs, failed=seen) == {"bad": "error: a key", "empty": "hm"} == seen
  out = capsys.readouterr().out
  assert "== a\n== b\n" in out and "failed: bad: error: a key" in out and "waits" not in out


def test_why_a_job_failed_is_kept_whole(tmp_path):
  """What a run says last may name many metrics before it says that they are not finite."""
  line = f"error: step 1: {', '.join(f'flow/metric_{n}' for n in range(30))} not finite; lower it"
  job = _job(tmp_path, "b", f"import sys; print({line!r}); sys.exit(2)")
  assert _run(tmp_path, [job]) == {"b": line}


def test_a_job_has_a_core_of_its_own(tmp_path):
  [core, *_] = processes.cores(2)
  code = f"import os, pathlib; pathlib.Path({str(tmp_path / 'j')!r}).write_text(" \
         "str(sorted(os.sched_getaffinity(0))))"
  assert _run(tmp_path, [_job(tmp_path, "j", code)], cores=[core]) == {}
  assert (tmp_path / "j").read_text() == str([core])
  assert processes.cores(1) == [None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_runs_save_themselves_and_ends_the_comparison(tmp_path, number):
  child = (
    "import pathlib, signal, sys, time\n"
    f"folder = pathlib.Path({str(tmp_path)!r})\n"
    "def save(*_):\n"
    "  (folder / 'saved').touch()\n"
    "  sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "(folder / 'started').touch()\n"
    "time.sleep(300)\n"
  )
  (tmp_path / "child.py").write_text(child)
  program = (
    "import os, pathlib, sys\n"
    "from unigrpo_jax.tools.compare import processes\n"
    f"folder = pathlib.Path({str(tmp_path)!r})\n"
    "job = processes.Job('x', [[sys.executable, str(folder / 'child.py')], ['false']],\n"
    "                    folder / 'log', 1.0)\n"
    "try:\n"
    "  processes.run(lambda: [job], cores=[None], environment=os.environ, on_end=lambda: None)\n"
    "except processes.Stopped:\n"
    "  print('stopped')\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE)
  while not (tmp_path / "started").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  process.send_signal(number)
  out, err = process.communicate(timeout=120)
  assert (out, err) == ("== x\nstopped\n", "") and (tmp_path / "saved").exists()


def test_a_signal_while_jobs_are_started_reaches_all_of_them(tmp_path, monkeypatch):
  begin = processes._Running._begin

  def signalled(self):
    begin(self)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(processes._Running, "_begin", signalled)
  jobs = [_job(tmp_path, name, "import time; time.sleep(100)") for name in ("a", "b")]
  start = time.monotonic()
  with pytest.raises(processes.Stopped):
    _run(tmp_path, jobs, cores=[None, None])
  assert time.monotonic() - start < 50
  assert (tmp_path / "a.log").exists() and not (tmp_path / "b.log").exists()


def test_the_last_line_of_a_log(tmp_path):
  log = tmp_path / "log"
  assert processes.last_line(log) == ""
  log.write_text("step 1\n 10%|\r 20%|\n****\n\n")
  assert processes.last_line(log) == "20%|"


def test_without_a_learned_reward_all_but_refl_are_compared(monkeypatch, tmp_path):
  monkeypatch.setattr(command.learned, "TINY_FOLDER", tmp_path / "missing")
  args, _ = command.parse_args(["--workdir=w"])
  assert args.reward_model == ""
  assert args.methods == ["FPO", "FlowGRPO", "TextGRPO", "UniFPO", "UniGRPO"]
  assert command.parse_args(["--workdir=w", "--reward_model=x"])[0].methods == list(methods.METHODS)
  monkeypatch.setattr(command.learned, "TINY_FOLDER", tmp_path)
  assert command.parse_args(["--workdir=w"])[0].reward_model == "tiny_reward_model"
