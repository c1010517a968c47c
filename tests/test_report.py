"""The page about a run: whole, self-contained, small, and there even when pieces are missing."""

import base64
import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, report
from unigrpo_jax.runtime import metrics
from unigrpo_jax.tools.report import page, samples, workdir

SCRIPT = "<script>alert('x')</script> & a \"kite\""
VOID = {"meta", "img"}


class _Reader(html.parser.HTMLParser):
  """Checks that tags nest, and keeps tags, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def _metrics(folder, steps):
  rng = np.random.default_rng(0)
  names = [
    "reward/mean", "reward/std", "reward/strict", "groups/zero_std", "text/ratio_mean",
    "text/approx_kl", "text/entropy", "text/length", "flow/ratio_max", "flow/clip_fraction",
    "flow/mse", "drift/text", "grad_norm/und", "grad_norm/gen", "trajectories_per_second",
    "seconds/rollout", "seconds/update", "seconds/total", "share/rollout", "share/update",
    *(f"custom/{k}" for k in range(20)), "alone",
  ]
  values = rng.uniform(0.1, 1, (steps, len(names))).round(6)
  with (folder / "metrics.jsonl").open("w") as file:
    file.write('{"step": 0, "seconds/evaluate": 1000.0}\n')
    for step, row in enumerate(values, 1):
      row = dict(zip(names, row.tolist())) | {"seconds/total": 4.0, "seconds/compile": 500.0}
      if step == 1:
        row["seconds/update"] = 2000.0
      row["grad_norm/gen"] = None if step % 10 == 3 else row["grad_norm/gen"]
      file.write(json.dumps({"step": step} | row) + "\n")
    file.write('{"step": 7, "rew')


def _evaluation(folder, iteration, strict):
  place = folder / "evaluations" / f"{iteration:06d}"
  (place / "images").mkdir(parents=True)
  pixels = np.full((32, 32, 3), 40 * iteration % 255, np.uint8)
  PIL.Image.fromarray(pixels).save(place / "images" / "think_0.png")
  rows = [
    {
      "mode": mode, "category": f"kind {k % 2}", "prompt": SCRIPT if k == 0 else f"prompt {k}",
      "text": "<think>two & two</think>" if mode == "think" else None,
      "rewards": {"strict": float(k < strict)},
      "image": "images/think_0.png" if k == 0 else None,
    }
    for mode in ("plain", "think") for k in range(10)
  ]
  results = {"title": "t", "modes": ["plain", "think"], "rows": rows}
  (place / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run with every piece."""
  folder = tmp_path_factory.mktemp("run")
  _metrics(folder, 50)
  _evaluation(folder, 0, 3)
  _evaluation(folder, 50, 8)
  config = {"data": {"url": "http://host/v1"}, "rewards": {"token": "hush", "note": SCRIPT}}
  (folder / "config.json").write_text(json.dumps(config))
  info = {"run_id": "the <run>", "versions": {"jax": "0.10"}, "devices": "8 x TPU"}
  (folder / "run.json").write_text(json.dumps(info))
  return folder


def _text(folder):
  return page.page(workdir.read(folder))


def test_timings_leave_out_what_is_not_an_iteration(folder):
  """The first evaluation, the iteration that compiles, and what other phases contain."""
  shown = page._timings(workdir.read(folder), "iteration")
  assert "first iteration, which compiles, is left out" in shown
  words = " ".join(_Reader(shown).text)
  assert "update" in words and "evaluate" not in words and "compile " not in words


def test_the_command_writes_one_page_that_parses_and_holds_everything(folder, tmp_path, capsys):
  out = tmp_path / "there" / "page.html"
  report.main([str(folder), f"--out={out}"])
  assert f"wrote {out}" in capsys.readouterr().out
  reader = _Reader(out.read_text(encoding="utf-8"))
  text = " ".join(reader.text)
  for piece in ("the <run>", "data.url", "http://host/v1", "8 x TPU", "custom/7", "alone", "kind 1",
                "outside phases", "<think>two & two</think>", "Reward: strict"):
    assert piece in text, piece
  assert "not found" not in text and "is missing" not in text and reader.tags.count("img") == 4


def test_a_prompt_with_markup_is_text(folder):
  text = _text(folder)
  reader = _Reader(text)
  assert "script" not in reader.tags and "<script" not in text
  assert reader.text.count(SCRIPT) == 3  # A card of either mode, and a value of the config.


def test_nothing_is_fetched(folder):
  text = _text(folder)
  reader = _Reader(text)
  links = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href")]
  assert links and all(value.startswith("data:image/png;base64,") for value in links)
  assert re.findall(r"https?://[^<\s]*", text) == ["http://host/v1"]
  assert "url(" not in text and "@import" not in text and not {"link", "script"} & set(reader.tags)


def test_secrets_are_hidden(folder):
  assert "hush" not in _text(folder) and "(hidden)" in _text(folder)
  shown = {"token_env": "NAME", "password": "", "max_tokens": 5}
  hidden = metrics.without_secrets({"a": {"hf_token": "x"}, "openai_api_key": "y"} | shown)
  assert hidden == {"a": {"hf_token": "(hidden)"}, "openai_api_key": "(hidden)"} | shown
  assert page.flatten({"max_tokens": 5, "a": {"password": ""}}) == {
    "max_tokens": "5", "a.password": ""
  }


def test_five_thousand_steps_stay_small(tmp_path):
  _metrics(tmp_path, 5000)
  text = _text(tmp_path)
  assert len(text.encode()) < 800_000
  longest = max(len(d.split("L")) for d in re.findall('class="line" d="([^"]*)"', text))
  assert 100 <= longest <= 600


def test_the_summary_gives_the_reward_before_and_after_with_intervals(folder):
  summary = page.summary(workdir.read(folder), "iteration")
  plain = re.sub("<[^>]*>", "", summary)
  # Jeffreys's intervals of 3 and of 8 in 10; see `intervals.interval`.
  assert plain.startswith(
    "strict (think): 0.300 [0.093, 0.606] → 0.800 [0.497, 0.956], iterations 0 to 50."
  )
  assert "51 rows of metrics, iterations 0 to 50, 3.3 minutes." in plain


def test_the_summary_is_about_the_mode_that_chooses_the_best(folder):
  run = workdir.read(folder)
  for modes, first in ((["plain", "think"], "plain"), (["think+guidance", "think"], "think")):
    chosen = dataclasses.replace(run, config={"eval": {"modes": modes}})
    assert f"strict ({first})" in page.summary(chosen, "iteration")
  for config in (None, [], {"eval": None}):
    assert "strict (think)" in page.summary(dataclasses.replace(run, config=config), "iteration")


def test_the_table_has_every_category_and_all(folder):
  reader = _Reader(samples.by_category(workdir.read(folder)))
  assert reader.tags.count("tr") == 1 + 2 * 3
  # Prompts 0, 2, 4, 6, 8 are of "kind 0": two of the first three are, and four of the first eight.
  cells = [text.strip() for text in reader.text]
  row = cells[cells.index("kind 0") :]
  assert row[1:3] == ["5", "0.400"] and row[4] == "0.800"


@pytest.mark.parametrize("gone", ["config.json", "run.json", "evaluations"])
def test_a_missing_piece_is_said(folder, tmp_path, gone):
  for path in folder.iterdir():
    if path.name != gone:
      (tmp_path / path.name).symlink_to(path)
  text = " ".join(_Reader(_text(tmp_path)).text)
  said = {"config.json": "config.json is missing", "run.json": "run.json was not found",
          "evaluations": "No evaluation was saved"}
  assert said[gone] in text


def test_broken_pieces_are_said(tmp_path):
  lines = ('{"step": 1, "ce": 2.5}', "broken", '{"step": 2, "ce": null}', "")
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  (tmp_path / "config.json").write_text("[1, ")
  for number, results in (("000000", "{"), ("000010", '{"rows": 5}'), ("000020", json.dumps(
    {"rows": [7, {"rewards": {"a": None, "b": 1}, "image": "../../secret.png"},
              {"mode": "m", "prompt": 3, "rewards": [], "image": "images/none.png"}]}
  ))):
    (tmp_path / "evaluations" / number).mkdir(parents=True)
    (tmp_path / "evaluations" / number / "results.json").write_text(results)
  (tmp_path / "evaluations" / "notes").mkdir()
  text = " ".join(_Reader(_text(tmp_path)).text)
  for piece in ("1 line(s) of metrics.jsonl were unreadable", "config.json is unreadable",
                "Evaluation 000000: results.json is unreadable", "There is one evaluation so far",
                "Evaluation 000010: results.json holds no rows", "none.png is missing or"):
    assert piece in text, piece


def test_a_supervised_run_shows_its_losses(tmp_path):
  rows = [{"step": s, "ce": 3 / s, "mse": 1.0, "grad_norm_und": 0.5} for s in range(1, 5)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  text = " ".join(_Reader(_text(tmp_path)).text)
  assert "This run logged no reward" in text and "4 rows of metrics, steps 1 to 4." in text
  assert "Losses" in text and "Gradient norms" in text and "last 0.75" in text
  assert "No seconds by phase" in text


def test_a_single_row_and_one_of_nothing_but_null(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 3, "reward/mean": null, "seconds/a": 1}\n')
  assert "no finite value yet" in _text(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "rew'])
def test_no_metrics_is_one_line_and_status_2(tmp_path, capsys, content):
  if content is not None:
    (tmp_path / "metrics.jsonl").write_text(content)
  with pytest.raises(SystemExit) as stopped:
    errors.report(lambda: report.main([str(tmp_path)]))
  assert stopped.value.code == 2 and not (tmp_path / "report.html").exists()
  [line] = capsys.readouterr().err.splitlines()
  assert "metrics.jsonl" in line


def test_what_was_evaluated_joins_files_and_logged_means(tmp_path):
  rows = [{"step": 0, "eval/think+guidance/soft": 0.25}, {"step": 5, "eval/think/strict": 0.5}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  _evaluation(tmp_path, 5, 4)
  run = workdir.read(tmp_path)
  assert workdir.evaluated(run, "soft") == {"think + guidance": [(0, [0.25])]}
  [(iteration, scores)] = workdir.evaluated(run, "strict")["think"]
  assert iteration == 5 and scores == [1.0] * 4 + [0.0] * 6


def test_large_pictures_are_scaled_and_small_ones_kept_to_the_byte(tmp_path):
  rng = np.random.default_rng(0)
  small, large = tmp_path / "small.png", tmp_path / "large.png"
  PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(small)
  PIL.Image.fromarray(rng.integers(0, 255, (1024, 512, 3), np.uint8)).save(large)
  assert base64.b64encode(small.read_bytes()).decode() in samples.picture(small)
  assert 'class="pixels"' in samples.picture(small)
  shown = samples.picture(large)
  assert "data:image/jpeg" in shown and 'class="photo"' in shown and len(shown) < 150_000


def test_the_spread_is_the_standard_deviation_around_the_mean(tmp_path):
  rows = [{"step": s, "reward/mean": 0.5, "reward/std": 0.25} for s in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  points = page._spread(workdir.read(tmp_path), "iteration")
  assert [(p.low, p.y, p.high) for p in points] == [(0.25, 0.5, 0.75)] * 2
  assert all(math.isfinite(p.y) for p in points)
