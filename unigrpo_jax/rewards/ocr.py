"""The reward `ocr`: whether the text that a prompt quotes can be read in the picture.

Source of the formula: Flow-GRPO, flow_grpo/ocr.py (arXiv 2505.05470, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import functools
import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import threading
from typing import Any, Protocol
import unicodedata
import weakref

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, making, threads

SECONDS = 60.0  # Time limit of one call of a program.
SMALLEST = 256  # Pictures are enlarged until their shorter side has at least so many pixels.


class Engine(Protocol):
  """Interface of an OCR engine; several threads call `read` at the same time."""

  settings: Mapping[str, Any]  # name, version, languages and whatever else its results depend on

  def read(self, image: PIL.Image.Image) -> str:
    """The text in an RGB picture, "" where there is none; may raise anything."""


class Tesseract:
  """The program `tesseract`; one process per picture."""

  def __init__(self, *, languages: str = "eng", psm: int = 3):
    """Finds the program.

    Args:
      languages: names of installed models, joined by "+".
      psm: page segmentation mode, 0 to 13. With 3 it finds text by itself; with 6 and 11 (one
        block, sparse text) it sees letters in noise.

    Raises:
      InputError: the program or a language is not installed.
    """
    errors.require("psm", psm, low=0, high=13, integer=True)
    if not (binary := shutil.which("tesseract")):
      raise errors.InputError(
        "engine='tesseract': there is no program tesseract; apt-get install tesseract-ocr, "
        "or take engine='rapidocr'"
      )
    self._environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    version = self._run([binary, "--version"]).decode().split()[1]
    installed = self._run([binary, "--list-langs"]).decode().split("\n")[1:]
    for language in languages.split("+"):
      if language not in installed:
        raise errors.InputError(
          f"languages={languages!r}: tesseract has {', '.join(filter(None, installed))}; "
          f"apt-get install tesseract-ocr-{language.replace('_', '-') or 'LANGUAGE'}"
        )
    self._command = [binary, "stdin", "stdout", "-l", languages, "--psm", str(psm)]
    self.settings = {
      "engine": "tesseract", "version": version, "languages": languages, "psm": psm,
    }

  def read(self, image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return self._run(self._command, file.getvalue()).decode("utf-8", "replace")

  def _run(self, command: Sequence[str], given: bytes = b"") -> bytes:
    # In a session of its own, so that Ctrl-C, which makes a run save itself, does not end it.
    done = subprocess.run(
      command, input=given, capture_output=True, timeout=SECONDS, env=self._environment,
      start_new_session=True,
    )
    if done.returncode:
      said = " ".join(done.stderr.decode("utf-8", "replace").split())[:200]
      raise RuntimeError(f"tesseract ended with status {done.returncode}: {said}")
    return done.stdout


class RapidOcr:
  """PP-OCRv4 on ONNX Runtime, by the package rapidocr-onnxruntime, which contains the weights."""

  def __init__(self, *, detection_side: int = 736):
    """Imports the package.

    Args:
      detection_side: pixels to which a shorter side with fewer is enlarged before text is detected.
        The package's default is 736; less is faster for small pictures. (Its other rule, by the
        longer side, ignores this number.)

    Raises:
      InputError: the package is not installed.
    """
    errors.require("detection_side", detection_side, low=32, integer=True)
    try:
      import rapidocr_onnxruntime
    except ImportError as error:
      raise errors.InputError(
        f"engine='rapidocr': {error}; pip install 'unigrpo_jax[ocr]' (rapidocr-onnxruntime)"
      ) from None
    self._make = functools.partial(
      rapidocr_onnxruntime.RapidOCR, intra_op_num_threads=1, inter_op_num_threads=1,
      det_limit_side_len=detection_side, det_limit_type="min",
    )
    self._of_thread = threading.local()  # One engine per thread: engines keep state of a picture.
    self.settings = {
      "engine": "rapidocr", "version": importlib.metadata.version("rapidocr-onnxruntime"),
      "languages": "ch+en", "detection_side": detection_side,
    }

  def read(self, image: PIL.Image.Image) -> str:
    if not hasattr(self._of_thread, "engine"):
      self._of_thread.engine = self._make()
    # It expects BGR. Lines are [box, text, confidence], from top to bottom.
    lines, _ = self._of_thread.engine(np.asarray(image)[..., ::-1])
    return "".join(text for _, text, confidence in lines or () if float(confidence) > 0)


ENGINES = {"tesseract": Tesseract, "rapidocr": RapidOcr}


def canonical(text: str, *, normalise: bool = False, whitespace: str = r"\s+") -> str:
  """The text in the form that is compared: in lower case, without white space.

  `normalise` converts it to Unicode NFKC first; `whitespace` is the regular expression to remove.
  """
  if normalise:
    text = unicodedata.normalize("NFKC", text)
  return re.sub(whitespace, "", text.lower())


def score(target: str, read: str) -> float:
  """1 - d / len(target), in [0, 1].

  d is 0 where `read` contains the target, else their Levenshtein distance, at most len(target).
  Both texts are as `canonical` returns them; the target is not empty.
  """
  if target in read:
    return 1.0
  if len(read) >= 2 * len(target):  # At least len(target) characters must be deleted.
    return 0.0
  return 1 - min(_distance(target, read), len(target)) / len(target)


def _distance(a: str, b: str) -> int:
  """The Levenshtein distance: insertions, deletions and replacements of one character."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    previous, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
  return row[-1]


def compare(target: str, recognised: str, *, normalise: bool = False) -> dict[str, Any]:
  """Compares the text that was read with the target.

  Returns:
    The reward's details: {"recognised", "target": the texts; "reward": see `score`; "exact": 1.0
    where both are equal, else 0.0; "extra_characters": characters read beyond the target's length}.
  """
  wanted, read = (canonical(text, normalise=normalise) for text in (target, recognised))
  return {
    "recognised": recognised, "target": target, "reward": score(wanted, read),
    "exact": float(wanted == read), "extra_characters": max(len(read) - len(wanted), 0),
  }


def target_of(prompt: str, metadata: Mapping[str, Any], quotes: str = '"') -> str:
  """The text that a picture should show: metadata's "text", else the first quoted one.

  Raises:
    ValueError: there is none; says why.
  """
  if "text" in metadata:
    if not isinstance(metadata["text"], str) or not metadata["text"].strip():
      raise ValueError(f"the metadata's text={metadata['text']!r:.60} is not text to be read")
    return metadata["text"]
  parts = prompt.split(quotes, 2)
  if len(parts) < 3:
    raise ValueError(f"no text between {quotes} in the prompt {prompt[:60]!r}")
  if not parts[1].strip():
    raise ValueError(f"nothing between the first {quotes} of the prompt {prompt[:60]!r}")
  return parts[1]


# {sample: {settings of the engine: its reading}}, so that rewards with different measures share it.
_readings: weakref.WeakKeyDictionary[base.Sample, dict[str, futures.Future]] = (
  weakref.WeakKeyDictionary()
)
_readings_lock = threading.Lock()


@making.register("ocr")
class Ocr:
  """How much of the text that a prompt quotes can be read: [N] float32, see `score`.

  A sample without a target, or that cannot be read, scores NaN.
  """

  concurrent = True

  def __init__(
    self, *, engine: str = "tesseract", quotes: str = '"', normalise: bool = False,
    measure: str = "reward", workers: int = 0, **engine_options: Any,
  ):
    """Makes the engine and starts threads.

    Args:
      engine: "tesseract" or "rapidocr".
      quotes: the mark that encloses the target in a prompt, '"' or "'". With "'", an apostrophe
        counts as one.
      normalise: compare in Unicode NFKC, which splits ligatures; Flow-GRPO does not.
      measure: what is returned, an entry of `compare`: "reward"; or, to be logged beside it with
        weight 0, "exact" or "extra_characters".
      workers: number of pictures read at once, each on one core; 0: as many as there are cores.
      engine_options: of the engine's class.

    Raises:
      InputError: an option is wrong, or the engine or a language is not installed.
    """
    errors.choose("engine", engine, ENGINES)
    errors.choose("quotes", quotes, ('"', "'"))
    errors.choose("measure", measure, ("reward", "exact", "extra_characters"))
    errors.require("workers", workers, low=0, integer=True)
    try:
      inspect.signature(ENGINES[engine]).bind(**engine_options)
    except TypeError as error:
      raise errors.InputError(f"engine={engine!r}: {error}") from None
    self._engine = ENGINES[engine](**engine_options)
    self._quotes, self._normalise, self._measure = quotes, normalise, measure
    self._pool = threads.Pool(workers or os.cpu_count() or 1, "ocr")
    self.settings = dict(self._engine.settings) | {"quotes": quotes, "normalise": normalise}
    self.fingerprint = json.dumps(self.settings | {"measure": measure}, sort_keys=True)

  def __call__(self, samples: Sequence[base.Sample]) -> base.Scores:
    """Scores of N samples; their details are those of `compare`, or a "reason"."""
    judged = [self._begin(sample) for sample in samples]
    details = [judge() for judge in judged]
    values = np.array([item.get(self._measure, np.nan) for item in details], np.float32)
    reason = next((item["reason"] for item in details if "reason" in item), None)
    return base.Scores(values, reason, details=details)

  def close(self) -> None:
    """Cancels the readings that have not begun."""
    self._pool.close()

  def _begin(self, sample: base.Sample) -> Callable[[], dict[str, Any]]:
    """Submits a picture to the threads, unless that was done already.

    Returns a function that waits for the reading and returns the sample's details.
    """
    try:
      target = target_of(sample.prompt, sample.metadata, self._quotes)
    except ValueError as error:
      reason = str(error)
      return lambda: {"reason": reason}
    key = json.dumps(self._engine.settings, sort_keys=True)
    with _readings_lock:
      of_sample = _readings.setdefault(sample, {})
      if key not in of_sample or of_sample[key].cancelled():
        of_sample[key] = self._pool.submit(_read, self._engine, sample.image)
      return functools.partial(self._judge, target, of_sample[key])

  def _judge(self, target: str, reading: futures.Future) -> dict[str, Any]:
    try:
      recognised = reading.result()
    except futures.CancelledError:
      return {"reason": "the reward was closed before it read this picture"}
    except Exception as error:  # Whatever a library raises.
      return {"reason": f"{self._engine.settings['engine']}: {errors.describe(error)}"[:300]}
    return compare(target, recognised, normalise=self._normalise)


def _read(engine: Engine, image: np.ndarray) -> str:
  """The text in a picture [H, W, 3] uint8; a small one is enlarged by an integer factor first."""
  picture = PIL.Image.fromarray(image)
  factor = -(-SMALLEST // min(picture.size))
  if factor > 1:
    picture = picture.resize(
      (picture.width * factor, picture.height * factor), PIL.Image.Resampling.BICUBIC
    )
  return engine.read(picture).strip()
