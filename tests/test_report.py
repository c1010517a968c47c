"""The page about a run: whole, self-contained, small, and there even when pieces are missing."""

import base64
import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import tomllib

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, report
from unigrpo_jax.runtime import metrics
from unigrpo_jax.tools.report import charts, figure, page, samples, workdir

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
      row["seconds/reward/strict"] = 300.0  # a part of a phase
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


def test_a_reward_that_only_measures_says_from_when_the_other_is_hacked(tmp_path):
  _metrics(tmp_path, 50)
  for step, reward, right in ((0, 0.2, 8), (20, 0.4, 9), (50, 0.9, 1)):
    place = tmp_path / "evaluations" / f"{step:06d}"
    place.mkdir(parents=True)
    rows = [
      {"mode": "think", "prompt": f"prompt {k}", "rewards": {
        "reward": reward, "learned": reward, "strict": float(k < right), "soft": 0.3,
      }} for k in range(10)
    ]
    (place / "results.json").write_text(json.dumps({"rows": rows}))
  rewards = {"learned": 1.0, "strict": 0, "soft": 0.0, "absent": 0.0}
  (tmp_path / "config.json").write_text(json.dumps({"rewards": rewards}))
  found = page.witnesses(workdir.read(tmp_path))
  assert list(found) == ["strict", "soft"]
  evaluations, said = found["strict"]
  assert said == (50, (20, 0.9), (50, 0.1), (50, 0.1)) and evaluations[0].score == 0.8
  assert found["soft"][1].onset is None
  text = re.sub(r"\s+", " ", "".join(_Reader(_text(tmp_path)).text))
  assert "strict iteration 50 0.800 0.900 (20) 0.100 0.100 (50) 0.500 → 0.500 – → 0.900" in text
  assert "soft not hacked 0.300 0.300 (0) 0.300 0.300 (50)" in text
  (tmp_path / "config.json").write_text(json.dumps({"rewards": ["strict"]}))
  assert page.witnesses(workdir.read(tmp_path)) == {}


@pytest.fixture(scope="module")
def whole(folder):
  """The page of that run."""
  return _text(folder)


def _text(folder):
  return page.render(workdir.read(folder))


def _charts(text):
  """The charts of a page as SVG texts."""
  encoded = re.findall('src="data:image/svg\\+xml;base64,([^"]*)"', text)
  return [base64.b64decode(chart).decode() for chart in encoded]


def _log(folder, rows):
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _between(text, start, end):
  """What a page says from one of its texts to another, in single spaces."""
  words = " ".join(" ".join(_Reader(text).text).split())
  return words[words.index(start) : words.index(end)]


def test_timings_leave_out_what_is_not_an_iteration(folder, whole):
  """The first evaluation, the iteration that compiles, and what other phases contain."""
  table = page.timings(workdir.read(folder), "iteration")
  assert table["first_is_left_out"] and table["median"] == pytest.approx(4.0)
  assert {name for name, _, _ in table["rows"]} == {"rollout", "update", "outside phases"}
  assert sum(share for _, _, share in table["rows"]) == pytest.approx(1.0)
  section = _between(whole, "Wall time", "Configuration")
  assert "The first iteration, which compiles, is left out. Evaluations took 0:16:40" in section


def test_the_command_writes_one_page_that_parses_and_holds_everything(folder, tmp_path, capsys):
  out = tmp_path / "there" / "page.html"
  report.main([str(folder), f"--out={out}"])
  assert f"wrote {out}" in capsys.readouterr().out
  reader = _Reader(out.read_text(encoding="utf-8"))
  text = " ".join(reader.text)
  for piece in ("the <run>", "data.url", "http://host/v1", "8 x TPU", "custom/7", "alone", "kind 1",
                "outside phases", "<think>two & two</think>", "Reward: strict"):
    assert piece in text, piece
  assert "not found" not in text and "is missing" not in text
  assert reader.attributes.count(("alt", "drawn picture")) == 4


def test_a_prompt_with_markup_is_text(whole):
  reader = _Reader(whole)
  assert "script" not in reader.tags and "<script" not in whole
  assert reader.text.count(SCRIPT) == 3  # A card of either mode, and a value of the config.


def test_nothing_is_fetched(whole):
  reader = _Reader(whole)
  links = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href")]
  assert links and all(re.match("data:image/(png|svg.xml);base64,", value) for value in links)
  for chart in _charts(whole):
    assert all(link.startswith("#") for link in re.findall('href="([^"]*)"', chart))
  assert re.findall(r"https?://[^<\s]*", whole) == ["http://host/v1"]
  assert "url(" not in whole and "@import" not in whole
  assert not {"link", "script"} & set(reader.tags)


def test_secrets_are_hidden(whole):
  assert "hush" not in whole and "(hidden)" in whole
  shown = {"token_env": "NAME", "password": "", "max_tokens": 5}
  hidden = metrics.without_secrets({"a": {"hf_token": "x"}, "openai_api_key": "y"} | shown)
  assert hidden == {"a": {"hf_token": "(hidden)"}, "openai_api_key": "(hidden)"} | shown


def test_a_configuration_is_shown_by_dotted_names(tmp_path):
  _log(tmp_path, [{"step": 1, "ce": 1.0}])
  (tmp_path / "config.json").write_text('{"max_tokens": 5, "a": {"b": {"c": "<i>"}, "d": {}}}')
  section = _between(_text(tmp_path), "All keys", "Versions")
  assert section.split() == ["All", "keys", "max_tokens", "5", "a.b.c", "<i>", "a.d", "{}"]


def test_five_thousand_steps_stay_small(tmp_path):
  _metrics(tmp_path, 5000)
  text = _text(tmp_path)
  assert len(text.encode()) < 800_000
  paths = [path for chart in _charts(text) for path in re.findall('d="([^"]*)"', chart)]
  assert 100 <= max(path.count("L") for path in paths) <= 600


def test_estimates_without_an_interval():
  """Equal scores outside [0, 1] show no range."""
  assert [samples.estimate(of) for of in ([5.0] * 3, [5.0], [])] == ["5.000", "5.000", "–"]


def test_the_summary_gives_the_reward_before_and_after_with_intervals(folder, whole):
  run = workdir.read(folder)
  before, after = (samples.estimate([1.0] * k + [0.0] * (10 - k)) for k in (3, 8))
  assert re.fullmatch(r"0\.300 \[0\.\d{3}, 0\.\d{3}\]", before) and after.startswith("0.800 [0.")
  summary = _between(whole, "strict (", "Rewards")
  assert summary.startswith(f"strict (think): {before} → {after} , iterations 0 to 50. Training")
  assert summary.endswith("Metrics of 51 iterations, 0 to 50; 0:03:20 of training. ")
  # Five is a tenth of the fifty steps.
  values = run.finite("reward/mean")
  assert page.training(run) == (
    pytest.approx(np.mean(values[:5])), pytest.approx(np.mean(values[-5:])), 5
  )


def test_the_summary_is_about_the_mode_that_chooses_the_best(folder):
  run = workdir.read(folder)
  for modes, first in ((["plain", "think"], "plain"), (["think+guidance", "think"], "think")):
    configured = dataclasses.replace(run, config={"eval": {"modes": modes}})
    assert page.headline(configured)[:2] == ("strict", first)
  for config in ({}, {"eval": {}}, {"eval": None}):
    assert page.headline(dataclasses.replace(run, config=config))[:2] == ("strict", "think")


def test_the_table_has_every_category_and_all(folder):
  rows = samples.by_category(workdir.read(folder), ["strict"])
  assert [row[:3] for row in rows] == [
    (mode, *row) for mode in ("plain", "think")
    for row in (("kind 0", 5), ("kind 1", 5), ("all", 10))
  ]
  # Prompts 0, 2, 4, 6, 8 are of "kind 0": two of the first three are, and four of the first eight.
  before, after = rows[0][3]
  assert before.startswith("0.400 [") and after.startswith("0.800 [")


@pytest.mark.parametrize("gone", ["config.json", "run.json", "evaluations"])
def test_a_missing_piece_is_noted(folder, tmp_path, gone):
  for path in folder.iterdir():
    if path.name != gone:
      (tmp_path / path.name).symlink_to(path)
  text = " ".join(_Reader(_text(tmp_path)).text)
  notes = {"config.json": "config.json is missing", "run.json": "run.json is missing",
           "evaluations": "No evaluation was saved"}
  assert notes[gone] in text


def test_broken_pieces_are_noted(tmp_path):
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
                "evaluations/000000/results.json is unreadable", "There is one evaluation so far",
                "evaluations/000010/results.json holds no rows", "none.png is missing or"):
    assert piece in text, piece


@pytest.mark.parametrize("resumed", ["true", "false"])
def test_evaluations_that_a_run_went_back_from_do_not_count(tmp_path, resumed):
  """It reached 30, was continued from 10 or begun anew, and is at 14."""
  for step, right in ((0, 3), (10, 5), (20, 9), (30, 1)):
    _evaluation(tmp_path, step, right)
  (tmp_path / "run.json").write_text(f'{{"run_id": "a", "resumed": {resumed}}}')
  _log(tmp_path, [{"step": step, "reward/mean": 0.5} for step in range(1, 15)])
  assert list(workdir.read(tmp_path).evaluations) == [0, 10]


def test_what_geneval_says_by_tag_is_no_reward_of_its_own(tmp_path):
  _evaluation(tmp_path, 0, 3)
  _evaluation(tmp_path, 10, 5)
  tags = {f"eval/think/strict/{tag}": 0.5 for tag in ("counting", "overall")}
  _log(tmp_path, [{"step": 0, "eval/think/strict": 0.3} | tags, {"step": 10, "reward/mean": 0.5}])
  run = workdir.read(tmp_path)
  assert page.scored_names(run) == ["strict"]
  section = _between(_text(tmp_path), "By category", "Versions")
  assert "strict, iteration 10" in section and "overall" not in section


def test_a_figure_pairs_prompts(tmp_path):
  """With several images of each, and where the second evaluation has other prompts too."""
  for step, prompts in ((0, range(6)), (10, range(2, 8))):
    place = tmp_path / "evaluations" / f"{step:06d}"
    (place / "images").mkdir(parents=True)
    PIL.Image.new("RGB", (32, 32)).save(place / "images" / "a.png")
    rows = [
      {"mode": "think", "prompt": f"prompt {number}", "number": number, "k": k,
       "image": "images/a.png", "rewards": {"reward": float(step > 0)}}
      for number in prompts for k in range(4)
    ]
    (place / "results.json").write_text(json.dumps({"rows": rows}))
  _log(tmp_path, [{"step": step, "reward/mean": 0.5} for step in range(1, 11)])
  run = workdir.read(tmp_path)
  assert figure.pairs(run, "think")[0][0].prompt == "prompt 2"
  assert [[one.key[0] for one in pair] for pair in figure.pairs(run, "think")] == [
    [f"prompt {number}"] * 2 for number in range(2, 6)]
  assert [one.step for one in figure.pairs(run, "think")[0]] == [0, 10]
  assert figure.pairs(run, "plain") == []
  figure.draw(run, tmp_path / "a.png")


def test_a_supervised_run_shows_its_losses(tmp_path):
  rows = [{"step": s, "ce": 3 / s, "mse": 1.0, "grad_norm_und": 0.5} for s in range(1, 5)]
  _log(tmp_path, rows)
  text = " ".join(_Reader(_text(tmp_path)).text)
  assert "This run logged no reward" in text and "Metrics of 4 steps, 1 to 4" in text
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


def test_images_of_one_prompt_count_as_one_value(folder, tmp_path):
  """Four equal images of each of ten prompts tell no more than one."""
  shutil.copytree(folder, tmp_path / "run")
  for path in (tmp_path / "run" / "evaluations").glob("*/results.json"):
    saved = json.loads(path.read_text())
    saved["rows"] = [
      row | {"number": number % 10, "k": k, "metadata": {"tag": 1}}
      for number, row in enumerate(saved["rows"]) for k in range(4)
    ]
    path.write_text(json.dumps(saved))
  once, four = (workdir.read(place) for place in (folder, tmp_path / "run"))
  assert four.evaluated("strict") == once.evaluated("strict")
  assert samples.by_category(four, ["strict"]) == samples.by_category(once, ["strict"])
  assert len(four.evaluations[50]) == 80


def test_what_was_evaluated_joins_files_and_logged_means(tmp_path):
  rows = [{"step": 0, "eval/think+guidance/soft": 0.25}, {"step": 5, "eval/think/strict": 0.5}]
  _log(tmp_path, rows)
  _evaluation(tmp_path, 5, 4)
  run = workdir.read(tmp_path)
  assert run.evaluated("soft") == {"think+guidance": [(0, [0.25])]}
  [(iteration, scores)] = run.evaluated("strict")["think"]
  assert iteration == 5 and scores == [1.0] * 4 + [0.0] * 6


def test_rows_of_the_same_step_are_one(tmp_path):
  """A log with a row for each evaluation shows what one with joint rows shows."""
  pages = []
  for name in ("apart", "joint"):
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"run_id": "r"}')
    rows = [{"step": 0, "eval/think/reward": 0.25}]
    for step in range(1, 4):
      training = {"step": step, "reward/mean": 0.5, "seconds/a": 1.0}
      evaluation = {"step": step, "eval/think/reward": 0.5, "seconds/evaluate": 2.0}
      rows += [training, evaluation] if name == "apart" else [training | evaluation]
    _log(folder, rows)
    pages.append(_text(folder))
  assert pages[0] == pages[1] and "<h1>run, run r</h1>" in pages[0]
  run = workdir.read(tmp_path / "apart" / "run")
  assert [row["step"] for row in run.rows] == [0, 1, 2, 3]
  assert run.rows[3] == {
    "step": 3, "reward/mean": 0.5, "seconds/a": 1.0, "eval/think/reward": 0.5,
    "seconds/evaluate": 2.0,
  }


def test_metrics_are_grouped_by_what_their_names_begin_or_end_with(tmp_path):
  groups = {
    "Drift": ["drift/text_mean", "drift/text_p99", "drift/ratio_of_something_new"],
    "Importance ratios": ["flow/log_ratio_p99", "text/ratio_mean"],
    "KL divergence": ["text/approx_kl", "text/kl_ref"],
    "Pictures": ["images/saturation", "images/diversity"],
    "Losses": ["loss/total", "flow/mse", "ce"],
    "Other: unheard_of": ["unheard_of/a", "unheard_of/b"],
    "Other": ["alone"],
  }
  elsewhere = ["reward/mean", "seconds/a", "share/a", "eval/think/reward"]
  keys = [key for keys in groups.values() for key in keys] + elsewhere
  _log(tmp_path, [{"step": 1} | dict.fromkeys(keys, 0.5), {"step": 2, "drift/text_p99": None}])
  health = page.health(workdir.read(tmp_path), "iteration")
  assert {title: [key for key, _, _ in charts] for title, (_, charts) in health.items()} == groups
  assert health["Drift"][1][1][2] == "last 0.5; 1 value(s) not finite"


def test_the_files_beside_the_code_are_packaged():
  root = pathlib.Path(page.__file__).parents[3]
  settings = tomllib.loads((root / "pyproject.toml").read_text())
  packaged = settings["tool"]["setuptools"]["package-data"]
  beside = {path.name for path in pathlib.Path(page.__file__).parent.iterdir() if path.is_file()}
  assert set(packaged["unigrpo_jax.tools.report"]) == {
    name for name in beside if not name.endswith(".py")
  }


def test_large_pictures_are_scaled_and_small_ones_kept_to_the_byte(tmp_path):
  rng = np.random.default_rng(0)
  small, large = tmp_path / "small.png", tmp_path / "large.png"
  PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(small)
  PIL.Image.fromarray(rng.integers(0, 255, (1024, 512, 3), np.uint8)).save(large)
  assert samples.data_uri(small) == (
    "data:image/png;base64," + base64.b64encode(small.read_bytes()).decode()
  )
  shown = samples.data_uri(large)
  assert shown.startswith("data:image/jpeg;base64,") and len(shown) < 150_000


def test_cards_pair_the_same_prompts_that_have_a_picture_or_a_text(folder):
  run = workdir.read(folder)
  cards = samples.cards(run)
  assert {mode: [[s.step for s in card] for card in cards[mode]] for mode in cards} == {
    "plain": [[0, 50]], "think": [[0, 50]] * 10
  }
  without = {
    step: [dataclasses.replace(sample, image=None) for sample in rows]
    for step, rows in run.evaluations.items()
  }
  # Another prompt at the end leaves the other pairs as they are.
  without[50][-1] = dataclasses.replace(without[50][-1], prompt="new")
  cards = samples.cards(dataclasses.replace(run, evaluations=without))
  assert cards["plain"] == [] and [card[0].prompt for card in cards["think"]] == [
    SCRIPT, *(f"prompt {k}" for k in range(1, 9))
  ]


def test_the_spread_is_the_standard_deviation_around_the_mean(tmp_path, monkeypatch):
  _log(tmp_path, [{"step": s, "reward/mean": 0.5, "reward/std": 0.25} for s in (1, 2)])
  drawn = {}
  monkeypatch.setattr(charts, "line_chart", lambda lines, *_, **__: drawn.update(lines))
  page.reward_chart(workdir.read(tmp_path), "reward", "iteration")
  line = drawn["training"]
  assert [line.low.tolist(), line.y.tolist(), line.high.tolist()] == [
    [0.25, 0.25], [0.5, 0.5], [0.75, 0.75]
  ]


def test_one_picture_of_before_and_after(folder, tmp_path, capsys):
  """Five prompts of mode plain rose; the picture of the first that has one is there, or damaged."""
  run = tmp_path / "run"
  shutil.copytree(folder, run)
  sizes = []
  for damage in (b"", b"no picture"):
    for path in run.glob("evaluations/000050/images/*") if damage else ():
      path.write_bytes(damage)
    report.main([str(run), f"--figure={tmp_path / 'a.png'}"])
    assert f"wrote {tmp_path / 'a.png'}" in capsys.readouterr().out
    sizes.append((tmp_path / "a.png").stat().st_size)
  assert sizes[0] > 10_000
  with PIL.Image.open(tmp_path / "a.png") as picture:
    assert picture.size == tuple(int(side * figure.DPI) for side in figure.SIZE)
  with pytest.raises(errors.InputError, match="ending of --figure='nothing' is none of png"):
    report.main([str(run), f"--figure={tmp_path / 'a.nothing'}", f"--out={tmp_path / 'none.html'}"])
  assert not (tmp_path / "none.html").exists()  # It is said before anything is written.


def test_a_picture_needs_two_evaluations(tmp_path):
  _log(tmp_path, [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.6}])
  draw = [str(tmp_path), f"--figure={tmp_path / 'a.png'}"]
  with pytest.raises(errors.InputError, match="no reward was evaluated twice"):
    report.main(draw)
  for config in ({"learning_rate": {}}, {"eval": {"every": 0}}):  # supervised; without evaluations
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match="this run does not evaluate; leave out --figure"):
      report.main(draw)
