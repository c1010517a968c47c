"""The checkpoints of a training run, in Orbax v1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import glob
import logging
import pathlib
import posixpath
import re
import sys
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from unigrpo_jax import errors

TOO_SMALL = "its weights do not fit in device memory; take more devices, or bfloat16"
# Of Orbax: what logs the traces of failed background threads. They reach us as exceptions too.
_BACKGROUND_FILES = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")


def is_full(error: BaseException) -> bool:
  """Whether an error or its cause is that a device has no memory left."""
  return "RESOURCE_EXHAUSTED" in f"{error} {error.__cause__}"


@functools.cache
def drop_lost_traces() -> None:
  """Keeps the traces that a failed read or write of Orbax leaves off the screen, from now on.

  There are hundreds, of its background threads, of closed event loops and of collected tasks. What
  failed is raised by Orbax all the same.
  """
  def is_of_orbax(path: str) -> bool:
    return "orbax" in pathlib.PurePath(path).parts

  def is_background_trace(record: logging.LogRecord) -> bool:
    name = pathlib.PurePath(record.pathname).name
    return bool(record.exc_info) and name in _BACKGROUND_FILES and is_of_orbax(record.pathname)

  def is_lost_task(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    is_lost = "was never retrieved" in message or "was destroyed but it is pending" in message
    return is_lost and "/orbax/" in message

  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_closed_loop = str(unraisable.exc_value) == "Event loop is closed"
    if not is_closed_loop and not (code is not None and is_of_orbax(code.co_filename)):
      show(unraisable)

  logging.getLogger("absl").addFilter(lambda record: not is_background_trace(record))
  logging.getLogger("asyncio").addFilter(lambda record: not is_lost_task(record))
  sys.unraisablehook = show_others


class _Folder(epath.gpath.PosixGPath):
  """A folder for Orbax, whose name is a name: without this, etils takes a "[" or "*" in it for a
  pattern when it lists what the folder holds, and "/gs/" for a bucket.
  """

  @property
  def _uri_scheme(self) -> None:
    return None

  def glob(self, pattern: str) -> Iterator[_Folder]:
    pattern = posixpath.join(glob.escape(str(self)), pattern)
    return (self._new(path) for path in self._backend.glob(pattern))


def check_name(path: pathlib.Path) -> None:
  """Refuses the few names that TensorStore and Orbax take for those of other folders.

  Raises:
    InputError: names what is wrong.
  """
  if wrong := re.search(r"\\|gs:/|[\ud800-\udfff]", f"{path.absolute()}/"):
    raise errors.InputError(
      f"{path}: no checkpoint can be kept under a name with {wrong[0]!r}; give another folder"
    )


@contextlib.contextmanager
def writing(path: pathlib.Path, kind: type[errors.InputError] | None = None) -> Iterator[None]:
  """Turns a failed write, of whatever sort the libraries raise, into one line.

  Raises:
    InputError: of the `kind`; None: as the failure says, see `errors.of_storage`.
  """
  try:
    yield
  except Exception as error:
    failed = errors.of_storage(error, path, "written", first_line(error))
    raise (failed if kind is None else kind(str(failed))) from None


def first_line(error: BaseException) -> str:
  """What went wrong, without the files and the settings that TensorStore adds."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  line = re.split(r" \[\w+=| See full TensorStore details", line)[0]
  line = re.sub(r' "/[^"]*":?', "", line)
  return line if len(line) <= 200 else f"{line[:60]} ... {line[-130:]}"


class TrainCheckpoints:
  """The checkpoints of a training run: saved in the background, atomic, the last few kept."""

  def __init__(
    self, folder: pathlib.Path | str, *, keep: int | None, every: int = 0,
    score: Callable[[int], float | None] | None = None, clean: bool = True,
  ):
    """Opens the folder.

    Args:
      keep: how many of the latest stay; None for all.
      every: the steps that are multiples of it stay as well; 0 for none.
      score: of a step or None, asked at every save, the same on all hosts. The best one stays.
      clean: removes what a killed save left behind; not where another process may be saving.
    """
    drop_lost_traces()
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if every:
      kept.append(policies.EveryNSteps(every))
    if score is not None:
      kept.append(_Best(score))
    self._checkpointer = ocp.training.Checkpointer(
      _Folder(pathlib.Path(folder).absolute()),
      preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=clean,
    )

  @property
  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  @property
  def steps(self) -> list[int]:
    """The steps of all complete checkpoints."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Saves the tree `state` and the JSON object `record`; returns once the arrays are copied.

    Raises:
      Storage: the previous save failed, or this one cannot start.
    """
    with writing(self._checkpointer.directory, errors.Storage):
      # A failed save must not go unnoticed until the run needs it.
      self._checkpointer.wait()
      self._checkpointer.save_async(step, state, custom_metadata=dict(record), force=True)

  def record(self, step: int) -> dict[str, Any]:
    """The JSON object that was saved with `step`."""
    return dict(self._checkpointer.metadata(step).custom_metadata or {})

  def load(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
    """The state of `step`, each array straight into the sharding that `abstract` gives it.

    With `partial`, `abstract` is a mapping from names of the state's fields, and the others are not
    read.
    """
    context = ocp.Context()
    context.pytree_options.loading.partial_load = partial
    try:
      with context:
        return self._checkpointer.load(step, abstract)
    except Exception as error:
      raise errors.InputError(
        f"{self._checkpointer.directory}: checkpoint {step} cannot be loaded "
        f"({first_line(error.__cause__ or error)}); to resume from the one before, move "
        "it to another folder"
      ) from error

  def close(self) -> None:
    """Waits for the save under way; raises Storage if it fails."""
    with writing(self._checkpointer.directory, errors.Storage):
      self._checkpointer.wait()
      self._checkpointer.close()


class _Best:
  """Orbax's policy of what stays: the checkpoint with the highest score; of equals, the last."""

  def __init__(self, score: Callable[[int], float | None]):
    self._score = score

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    scores = {info.step: self._score(info.step) for info in checkpoints}
    scored = [step for step, score in scores.items() if score is not None]
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    return [info.step == best for info in checkpoints]
