"""The checkpoints of a training run, in Orbax v1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import glob
import json
import logging
import pathlib
import posixpath
import re
import secrets
import sys
from typing import Any, TypeVar

from etils import epath
from orbax.checkpoint import path as path_lib
from orbax.checkpoint import v1 as ocp

from unigrpo_jax import errors, types
from unigrpo_jax.data import files
from unigrpo_jax.runtime import checksums, hosts

TOO_SMALL = "its weights do not fit in device memory; take more devices, or bfloat16"
# Of TensorStore: files that are missing, too short, or whose checksums or codes are wrong.
_DAMAGE = re.compile("DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|INVALID_ARGUMENT: Error (reading|decoding)")
_Read = TypeVar("_Read")
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

  def is_known(record: logging.LogRecord) -> bool:
    # We name what is damaged. A write that goes on in a thread after its interruption finds its
    # folder gone.
    message = record.getMessage()
    return message.startswith("Failed to json parse Metadata file") or (
      "Skipping merge of OCDBT checkpoints" in message)

  def is_lost_task(record: logging.LogRecord) -> bool:
    # Of Orbax's coroutines, or of a read or write of TensorStore that they no longer wait for.
    message = record.getMessage()
    is_lost = "was never retrieved" in message or "was destroyed but it is pending" in message
    return is_lost and ("orbax" in message or "tensorstore" in message)

  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_closed_loop = str(unraisable.exc_value) == "Event loop is closed"
    if not is_closed_loop and not (code is not None and is_of_orbax(code.co_filename)):
      show(unraisable)

  logging.getLogger("absl").addFilter(
    lambda record: not is_background_trace(record) and not is_known(record)
  )
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


def for_orbax(path: pathlib.Path) -> epath.Path:
  """An absolute path as Orbax is to be given it."""
  return path if files.is_object(path) else _Folder(path)


def check_name(path: pathlib.Path) -> None:
  """Refuses the few names that TensorStore and Orbax take for those of other folders.

  Raises:
    InputError: names what is wrong.
  """
  if files.is_object(path):
    return
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
  line = re.split(r" \[[\w ]+=| See full TensorStore details", line)[0]
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
      every: the steps that are multiples of it stay as well, but for step 0; 0 for none.
      score: of a step or None, asked at every save, the same on all hosts. The best one stays.
      clean: removes what a killed save left behind; not where another process may be saving.
    """
    drop_lost_traces()
    self._folder = files.path(folder).absolute()
    self._unsealed: int | None = None
    self._saving: Any = None  # Orbax's response to the last save
    self._names = _ReadableNames()
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if every:
      kept.append(_Multiples(every))
    if score is not None:
      kept.append(_Best(score))
    self._kept = policies.AnyPreservationPolicy(kept)
    self._checkpointer = ocp.training.Checkpointer(
      for_orbax(self._folder),
      preservation_policy=self._kept, cleanup_tmp_directories=clean,
      step_name_format=self._names,
    )

  @property
  def latest(self) -> int | None:
    """The step of the newest checkpoint, sound or not."""
    return max(self.steps, default=None)

  @property
  def steps(self) -> list[int]:
    """The steps of all checkpoints, sound or not."""
    readable = {checkpoint.step for checkpoint in self._checkpointer.checkpoints}
    return sorted(readable | self._names.unreadable.keys())

  def newest(
    self, read: Callable[[int], _Read], *, only: int | None = None, move: bool = True
  ) -> tuple[int, _Read]:
    """(step, `read(step)`) of the newest sound checkpoint; there must be a checkpoint.

    Prints which damaged ones are passed over, and moves them to a folder beside, where nothing
    counts or removes them.

    Args:
      read: reads a step; may raise Damaged, and of several hosts all do so.
      only: this step and no other.
      move: not where another process may use the folder.

    Raises:
      InputError: none is sound, or whatever `read` raises.
    """
    damaged = {}
    for step in reversed(self.steps) if only is None else (only,):
      try:
        with hosts.raise_on_all_hosts():
          if step in self._names.unreadable:
            raise _metadata_error(self._names.unreadable[step], self._path(step))
          if hosts.first():
            checksums.verify(self._path(step))
        found = read(step)
      except errors.Damaged as error:
        damaged[step] = error
        continue
      self._pass_over(damaged, step, move)
      return step, found
    reasons = "; ".join(map(str, damaged.values()))
    advice = "choose a new --workdir" if only is None else "choose another one"
    raise errors.InputError(f"{reasons}; put back a sound copy, or {advice}")

  def _pass_over(self, damaged: Mapping[int, errors.Damaged], step: int, move: bool) -> None:
    """Prints what `damaged` lost over `step`; moves it aside."""
    if not damaged:
      return
    aside = self._folder.with_name(f"{self._folder.name}_damaged")
    lost = max(damaged) - step
    hosts.print_first(
      "\n".join(map(str, damaged.values())) + f"\npassed over for the checkpoint of step {step}: "
      f"{lost} step{'s' * (lost > 1)} less" + f"; kept in {aside}" * move
    )
    if not move:
      return
    with hosts.raise_on_all_hosts():
      if hosts.first():
        with writing(aside, errors.Storage):
          aside.mkdir(exist_ok=True)
          for number in damaged:
            self._path(number).rename(aside / f"{number}-{secrets.token_hex(2)}")
    self._checkpointer.reload()

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  @property
  def is_saving(self) -> bool:
    """Whether a save is under way."""
    return self._checkpointer.is_saving_in_progress()

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Saves the tree `state` and the JSON object `record`; returns once the arrays are copied.

    Raises:
      Storage: the previous save failed, or this one cannot start.
    """
    with writing(self._checkpointer.directory, errors.Storage):
      # A failed save must not go unnoticed until the run needs it.
      self._wait()
      self._seal()
      self._saving = self._checkpointer.save_async(
        step, _kept(state), custom_metadata=dict(record), force=True
      )
      self._unsealed = step

  def _wait(self) -> None:
    """Waits for the save under way and for removals; raises what failed."""
    saving, self._saving = self._saving, None
    if saving is not None:
      # Ends the save's event loop as well, its thread and files, which Orbax's `wait` leaves open.
      saving.result()
    self._checkpointer.wait()

  def _seal(self) -> None:
    """Keeps the checksums of what was saved last, beside it, once it is complete."""
    if self._unsealed is not None and hosts.first():
      with contextlib.suppress(FileNotFoundError):  # It may be removed already.
        checksums.write(self._path(self._unsealed))
    self._unsealed = None

  def record(self, step: int) -> dict[str, Any]:
    """The JSON object that was saved with `step`.

    Raises:
      Damaged: it is missing, or cannot be read; Storage where trying again may help.
    """
    try:
      record = dict(self._checkpointer.metadata(step).custom_metadata or {})
    except Exception as error:
      raise _metadata_error(error, self._path(step)) from error
    if not record:
      raise errors.Damaged(f"{self._path(step)} is damaged: it has no metadata")
    return record

  def load(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
    """The state of `step`, each array straight into the sharding that `abstract` gives it.

    With `partial`, `abstract` is a mapping from names of the state's fields, and the others are not
    read.

    Raises:
      Damaged: its files are.
      InputError: it is of another tree, or cannot be read for another reason.
    """
    context = ocp.Context()
    context.pytree_options.loading.partial_load = partial
    try:
      with context:
        kept = _kept(abstract)
        loaded = self._checkpointer.load(step, kept)
        return loaded if kept is abstract else abstract.replace(**loaded)
    except Exception as error:
      # The other hosts would wait for one that goes on alone.
      if cause := _damage(error) if hosts.count() == 1 else None:
        raise errors.Damaged(f"{self._path(step)} is damaged: {cause}") from error
      if passing := _passing(error, self._path(step)):
        raise passing from error
      raise errors.InputError(
        f"{self._checkpointer.directory}: checkpoint {step} cannot be loaded "
        f"({first_line(error.__cause__ or error)}); to resume from the one before, move "
        "it to another folder"
      ) from error

  def close(self) -> None:
    """Waits for the save under way; raises Storage if it fails.

    Removes what is not kept: a process may have been killed after a save and before that.
    """
    with writing(self._checkpointer.directory, errors.Storage):
      self._wait()
      self._seal()
      found = self._checkpointer.checkpoints
      context = ocp.training.preservation_policies.PreservationContext()
      for checkpoint, is_kept in zip(found, self._kept.should_preserve(found, context=context)):
        if not is_kept:
          self._checkpointer.delete(checkpoint.step)
      self._checkpointer.close()


def _kept(state: Any) -> Any:
  """What is written of a state: without an anchor that it has not, as before there were any."""
  if not isinstance(state, types.TrainState) or state.anchor is not None:
    return state
  names = [field.name for field in dataclasses.fields(state)]
  return {name: getattr(state, name) for name in names if name != "anchor"}


def _damage(error: BaseException | None) -> str | None:
  """What in an error, or in those that it comes from, says that files are damaged; else None."""
  while error is not None:
    is_wrong = isinstance(error, (FileNotFoundError, json.JSONDecodeError))
    if is_wrong or type(error) is KeyError or _DAMAGE.search(str(error)):
      return first_line(error)
    error = error.__cause__ or error.__context__
  return None


def _passing(error: Exception, path: Any) -> errors.Storage | None:
  """The error of a read that failed for a reason that may pass, so that the file may be sound."""
  failed = errors.of_storage(error, path, "read")
  return failed if isinstance(error, OSError) and isinstance(failed, errors.Storage) else None


def _metadata_error(error: Exception, path: Any) -> errors.InputError:
  return _passing(error, path) or errors.Damaged(
    f"{path} is damaged: its metadata cannot be read ({first_line(error)})"
  )


class _ReadableNames:
  """Orbax's names of checkpoint folders, without those whose metadata it fails to read: one alone
  would keep it from opening any.

  Attributes:
    unreadable: {step: the error}, of the last search.
  """

  def __init__(self):
    self._names = path_lib.step.standard_name_format()
    self.unreadable: dict[int, Exception] = {}

  def __getattr__(self, name: str) -> Any:
    return getattr(self._names, name)

  def find_all(self, folder: Any) -> Iterator[Any]:
    self.unreadable.clear()
    for path in folder.iterdir() if folder.exists() else ():
      if path.name.isdecimal() and not path.is_dir():  # A file, or a link to nowhere.
        self.unreadable[int(path.name)] = ValueError("it is no folder")
    for found in self._names.find_all(folder):
      try:
        _ = found.commit_timestamp  # It keeps what it reads.
      except Exception as error:
        self.unreadable[found.step] = error
      else:
        yield found


class _Multiples:
  """Orbax's policy of what stays: steps that are multiples; not 0, which a stop may have saved."""

  def __init__(self, every: int):
    self._every = every

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    return [info.step > 0 and info.step % self._every == 0 for info in checkpoints]


class _Best:
  """Orbax's policy of what stays: the checkpoint with the highest score; of equals, the last."""

  def __init__(self, score: Callable[[int], float | None]):
    self._score = score

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    scores = {info.step: self._score(info.step) for info in checkpoints}
    scored = [step for step, score in scores.items() if score is not None]
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    return [info.step == best for info in checkpoints]
