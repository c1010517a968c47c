"""The reward of readable text: its formula, targets, engines (fakes here, real ones with -m slow).
"""

import json
import os
import pathlib
import shutil
import sys
import threading
import types

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest

from tests import refusals
from tests.parity import cases
from tests.parity import ocr as recorded
from unigrpo_jax import rewards
from unigrpo_jax.data import prompts
from unigrpo_jax.rewards import ocr
from unigrpo_jax.rewards.judge import answers, forms

WHITE = np.full((300, 300, 3), 255, np.uint8)


def sample(prompt='a sign "Hello World"', image=WHITE, **metadata):
  return rewards.Sample(prompt, image, metadata=metadata)


class Reader:
  """An engine that reads what it was told, or raises it."""

  told, settings = "", {"engine": "reader", "version": "1", "languages": "none"}
  sizes: list[tuple[int, int]] = []

  def read(self, image):
    self.sizes.append(image.size)
    if isinstance(self.told, Exception):
      raise self.told
    return self.told


@pytest.fixture
def read(monkeypatch):
  """(text that is read, samples, options) -> Scores; pictures are not looked at."""
  monkeypatch.setitem(ocr.ENGINES, "tesseract", Reader)
  monkeypatch.setattr(Reader, "sizes", [])

  def score(told, *samples, **options):
    monkeypatch.setattr(Reader, "told", told)
    reward = rewards.make("ocr", workers=2, **options)
    try:
      return rewards.evaluate(reward, samples)
    finally:
      reward.close()

  return score


def test_the_formula_gives_the_recorded_rewards(golden_rewards):
  report = cases.Report("ocr")
  recorded.rewards_of_texts(golden_rewards / "ocr" / "rewards.jsonl", report)
  assert [line.result for line in report.lines] == [cases.PASS] * 2


@pytest.mark.parametrize("target, text, expected", [
  ("stop", "stop", 1), ("stop", "nonstopshow", 1), ("stop", "stp", 0.75), ("stop", "stoop", 0.75),
  ("stop", "spot", 0.5), ("stop", "", 0), ("stop", "x" * 100, 0), ("stop", "s-t-o-p", 0.25),
  ("a", "b", 0), ("abc", "xxabxx", 0), ("kitten", "sitting", 0.5),
])
def test_the_formula_by_hand(target, text, expected):
  assert ocr.score(target, text) == pytest.approx(expected)


def test_letters_are_compared_in_nfkc_only_where_wanted(read):
  fine = sample('"ﬁne ½"')
  assert read("fine 1⁄2", fine).values[0] < 1
  assert read("fine 1⁄2", sample('"ﬁne ½"'), normalise=True).values[0] == 1


@pytest.mark.parametrize("prompt, metadata, expected", [
  ('a "red" and a "blue" sign', {}, "red"),
  ("no quotes", {"text": "from metadata"}, "from metadata"),
  ('a "red" sign', {"text": "blue"}, "blue"),
])
def test_the_target(prompt, metadata, expected):
  assert ocr.target_of(prompt, metadata) == expected
  assert ocr.target_of("it's 'so' it", {}, "'") == "s "  # an apostrophe opens one


@pytest.mark.parametrize("bad, words", [
  (sample("a sign"), 'no text between " in the prompt \'a sign\''),
  (sample('a 5" screen'), "no text between"),
  (sample("a 'red' sign"), "no text between"),
  (sample('a sign " "'), "nothing between the first"),
  (sample('a sign ""'), "nothing between the first"),
  (sample(text=""), "the metadata's text='' is not"),
  (sample(text=["a"]), "the metadata's text=['a'] is not"),
])
def test_without_a_target_there_is_no_score_and_nothing_is_read(bad, words, read):
  scores = read("Hello World", bad, sample())
  np.testing.assert_array_equal(scores.values, [np.nan, 1])
  assert words in scores.reason and words in scores.details[0]["reason"]
  assert len(Reader.sizes) == 1


def test_details_say_what_was_read_and_how_much_more_than_the_target(read):
  scores = read("HELLO\nWORLD sale 50%\n", sample(), sample('"sale"'))
  assert scores.values.tolist() == [1, 1]
  assert scores.details[0] == {
    "recognised": "HELLO\nWORLD sale 50%", "target": "Hello World", "reward": 1.0, "exact": 0.0,
    "extra_characters": 7,
  }
  assert read("hello world", sample(), measure="exact").values == 1
  assert read("hello world!", sample(), measure="exact").values == 0
  assert read("hello world!", sample(), measure="extra_characters").values == 1
  assert read("hello", sample(), measure="extra_characters").values == 0


def test_what_an_engine_raises_is_no_score(read):
  scores = read(RuntimeError("no\nmemory"), sample())
  assert np.isnan(scores.values[0]) and scores.reason == "reader: RuntimeError: no memory"


def test_small_pictures_are_enlarged_by_a_whole_factor(read):
  for height, width in ((64, 100), (255, 255), (256, 256), (300, 255), (2, 600)):
    read("", sample(image=np.zeros((height, width, 3), np.uint8)))
  assert Reader.sizes == [(400, 256), (510, 510), (256, 256), (510, 600), (76800, 256)]


def test_measures_of_the_same_pictures_share_one_reading(read, monkeypatch):
  samples = [sample() for _ in range(3)]
  monkeypatch.setattr(Reader, "told", "hello world")
  made = [rewards.make("ocr", measure=measure) for measure in ("reward", "exact")]
  for reward in made:
    assert rewards.evaluate(reward, samples).values.tolist() == [1, 1, 1]
    reward.close()
  assert len(Reader.sizes) == 3


def test_pictures_are_read_at_once_and_a_closed_reward_returns(monkeypatch):
  monkeypatch.setitem(ocr.ENGINES, "tesseract", Reader)
  both, end = threading.Barrier(3, timeout=20), threading.Event()

  def together(self, image):
    both.wait()
    end.wait(20)
    return "hello world"

  monkeypatch.setattr(Reader, "read", together)
  reward = rewards.make("ocr", workers=2)
  scorer = rewards.Scorer({"ocr": reward}, {"ocr": 1.0})
  pending = scorer.submit([sample() for _ in range(4)])
  both.wait()
  reward.close()
  end.set()
  values = pending.result(20)["ocr"]
  assert np.isnan(values).any() and scorer.failures["ocr"].count == np.isnan(values).sum()
  scorer.close()


def test_settings_have_what_changes_a_score(read):
  reward = rewards.make("ocr", quotes="'", normalise=True)
  assert reward.settings == Reader.settings | {"quotes": "'", "normalise": True}
  assert json.loads(reward.fingerprint) == reward.settings | {"measure": "reward"}
  assert reward.concurrent
  reward.close()


@pytest.mark.parametrize("options, words", [
  ({"engine": "paddle"}, "engine='paddle' is none of tesseract, rapidocr"),
  ({"quotes": "“"}, "quotes='“' is none of"),
  ({"measure": "exakt"}, "did you mean 'exact'"),
  ({"workers": -1}, "workers=-1 must be at least 0"),
  ({"detection_side": 9}, "engine='tesseract': got an unexpected keyword argument"),
  ({"engine": "rapidocr", "psm": 6}, "engine='rapidocr': got an unexpected keyword argument 'psm'"),
])
def test_bad_options_are_refused(options, words):
  assert words in refusals.refusal(rewards.make, "ocr", **options)


def test_a_judge_can_transcribe():
  form = forms.make(forms.Options(form="transcribe"))
  [question] = form.questions(sample())
  assert "all text" in question.text and not question.logprobs
  read = lambda text, **more: question.read(answers.Reply(text, **more))
  score, facts = form.score(sample(), [read("<think>a sign</think> HELLO  world!")])
  assert score == 1 and facts["extra_characters"] == 1 and facts["recognised"] == "HELLO  world!"
  assert form.score(sample(), [read("[No text].")])[0] == 0
  for text, more in (("", {}), ("Hello", {"cut": True})):
    with pytest.raises(answers.Unreadable):
      read(text, **more)
  assert "no text between" in refusals.refusal(form.questions, sample("a sign"))


# Engines.


@pytest.fixture
def program(tmp_path, monkeypatch):
  """A stand-in for the program, which says its arguments and how many bytes it was given."""
  script = tmp_path / "tesseract"
  script.write_text(
    "#!/bin/sh\ncase $1 in\n"
    "--version) echo 'tesseract 5.3.0'; echo ' leptonica-1.82.0';;\n"
    "--list-langs) echo 'List of available languages in \"/x\" (2):'; echo eng; echo osd;;\n"
    "*) read -r first; echo \"$* $OMP_THREAD_LIMIT\"; printf '\\f';;\nesac\n"
  )
  script.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  return script


def test_tesseract_gets_a_png_and_its_arguments(program):
  engine = ocr.Tesseract(psm=6)
  assert engine.read(PIL.Image.fromarray(WHITE)) == "stdin stdout -l eng --psm 6 1\n\f"
  assert engine.settings == {
    "engine": "tesseract", "version": "5.3.0", "languages": "eng", "psm": 6}
  program.write_text("#!/bin/sh\ncat > /dev/null; echo broken >&2; exit 3\n")
  with pytest.raises(RuntimeError, match="ended with status 3: broken"):
    engine.read(PIL.Image.fromarray(WHITE))


def test_what_tesseract_lacks_is_one_line(program, monkeypatch):
  message = refusals.refusal(rewards.make, "ocr", languages="eng+chi_sim")
  assert message == (
    "languages='eng+chi_sim': tesseract has eng, osd; apt-get install tesseract-ocr-chi-sim")
  assert "psm=14 must be" in refusals.refusal(rewards.make, "ocr", psm=14)
  monkeypatch.setenv("PATH", "/nowhere")
  message = refusals.refusal(rewards.make, "ocr")
  assert "there is no program tesseract; apt-get install tesseract-ocr" in message


def test_rapidocr_gets_bgr_in_an_engine_of_each_thread(monkeypatch):
  made = []

  class RapidOCR:
    def __init__(self, **options):
      made.append(options)

    def __call__(self, image):
      assert image.shape == (300, 300, 3) and image[0, 0].tolist() == [3, 2, 1]
      return [[[], "Hel", 0.9], [[], "no", 0.0], [[], "lo", "0.8"]], [0.1]

  module = types.SimpleNamespace(RapidOCR=RapidOCR)
  monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
  monkeypatch.setattr(ocr.importlib.metadata, "version", lambda name: "1.4.4")
  engine = ocr.RapidOcr(detection_side=192)
  image = PIL.Image.new("RGB", (300, 300), (1, 2, 3))
  assert engine.read(image) == engine.read(image) == "Hello"
  thread = threading.Thread(target=engine.read, args=(image,))
  thread.start()
  thread.join()
  assert made == 2 * [{
    "intra_op_num_threads": 1, "inter_op_num_threads": 1, "det_limit_side_len": 192,
    "det_limit_type": "min"}]
  assert engine.settings["version"] == "1.4.4" and engine.settings["detection_side"] == 192
  module.RapidOCR.__call__ = lambda self, image: (None, None)
  assert engine.read(image) == ""
  monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
  message = refusals.refusal(rewards.make, "ocr", engine="rapidocr")
  assert "pip install 'unigrpo_jax[ocr]'" in message


def drawn(text, size=512):
  """Words in a font of Debian, one a line, black on white."""
  names = ("dejavu/DejaVuSans.ttf", "liberation/LiberationSans-Regular.ttf")
  paths = [pathlib.Path("/usr/share/fonts/truetype") / name for name in names]
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    pytest.skip("needs fonts-dejavu-core or fonts-liberation")
  image = PIL.Image.new("RGB", (size, size), "white")
  PIL.ImageDraw.Draw(image).multiline_text(
    (size // 2, size // 2), text.replace(" ", "\n"), "black",
    PIL.ImageFont.truetype(path, 48 * size // 512), anchor="mm")
  return np.asarray(image)


@pytest.mark.slow
@pytest.mark.parametrize("engine, options", [
  ("tesseract", {}), ("rapidocr", {}), ("rapidocr", {"detection_side": 192})])
def test_a_real_engine_reads_drawn_words(engine, options):
  if engine == "tesseract" and not shutil.which("tesseract"):
    pytest.skip("apt-get install tesseract-ocr")
  if engine == "rapidocr":
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install 'unigrpo_jax[ocr]'")
  reward = rewards.make("ocr", engine=engine, **options)
  for size in (512, 128):
    samples = [
      rewards.Sample(p, drawn(m["text"], size), metadata=m)
      for p, m in prompts.generated("words", "test", 5)]
    assert rewards.evaluate(reward, samples).values.mean() >= 0.9
  assert rewards.evaluate(reward, [sample()]).values == 0  # blank
  assert set(reward.settings) >= {"engine", "version", "languages"}
  reward.close()
