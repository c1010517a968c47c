"""Several hosts as one program: when JAX connects them, what they must agree on, what they tell.

Every host runs the same command. Whatever decides what runs next (a signal, an error, a score) is
made known to all of them first: a host that went another way would leave the others waiting in a
collective operation for ever. On one host nothing here costs anything or calls anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import traceback
from typing import Any
import urllib.error
import urllib.request

import jax
from jax.experimental import multihost_utils
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.runtime import host_flags

# Machines of a pod may be made one after the other; later than this one of them is missing.
START_SECONDS = 900
HINT_SECONDS = 60
# A host that is silent for so long is taken for dead. Moving a virtual machine takes some tens of
# seconds, and so may a machine that has too few cores; JAX's own threads send the signs of life, so
# a busy program is not silent.
SILENCE_SECONDS = 100
# The first host to end waits so long for the others.
END_SECONDS = 60
AGAIN = "start all hosts again with the same command"
# Runs beside the program: a runtime that finds a dead host aborts in native code, where no Python
# gets a word in.
_LAST_WORDS = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)"


def start(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Connects the hosts where there are several; before anything else that uses a device.

  Args:
    coordinator: HOST:PORT of process 0, which all others reach.
    processes: how many there are.
    process: which of them this is, from 0. All three are given, or none: then the hosts of a
      cluster that JAX knows are connected, and a single machine starts nothing.

  Raises:
    InputError: the three do not fit together.
  """
  given = (coordinator, processes, process)
  if all(value is None for value in given):
    if not in_cluster(os.environ):
      return
  elif None in given:
    raise errors.InputError("give all of --coordinator, --processes and --process, or none")
  else:
    _check(*given)
  waiting = _waiting(
    f"{'all' if processes is None else processes} hosts, the first of them at "
    f"{coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', 'the address the cluster gives')}"
  )
  # JAX's own handler would swallow a SIGTERM that comes before the run's.
  jax.config.update("jax_enable_preemption_service", False)
  # Two programs that a CPU runs at once send each other's messages over the same connection.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  with waiting:
    jax.distributed.initialize(
      *given, initialization_timeout=2 * START_SECONDS,  # `waiting` ends it, with one line
      heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=END_SECONDS,
    )
    count = jax.local_device_count()
  print(f"{name()}: {socket.gethostname()}, {count} local device(s)", flush=True)


def _check(coordinator: str, processes: int, process: int) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise errors.InputError(f"--coordinator={coordinator} must be HOST:PORT")
  errors.require("--processes", processes, low=1)
  errors.require("--process", process, low=0, high=processes - 1)


def in_cluster(environ: Mapping[str, str]) -> bool:
  """Whether this is one of several hosts that JAX can find out about by itself.

  Args:
    environ: variables of the environment.

  Returns:
    True for a task of a SLURM job step of several, and for one of several workers or slices of TPUs
    (GKE's variables, or the metadata of a TPU VM).
  """
  number = lambda name: int(environ.get(name) or 1)
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
  if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ and number("SLURM_NTASKS") > 1:
    return True
  if "," in workers or number("MEGASCALE_NUM_SLICES") > 1:
    return True
  # Nothing else than the metadata server knows of a TPU VM's neighbours. JAX sets this variable
  # where it sees no TPU.
  if environ.get("TPU_SKIP_MDS_QUERY") or environ.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
    return False
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  slices = "MEGASCALE_NUM_SLICES: '1'"
  return (
    "," in _metadata(server, "worker-network-endpoints")
    or any(line.startswith("MEGASCALE_NUM_SLICES") and line.strip() != slices
           for line in _metadata(server, "tpu-env").splitlines())
  )


def _metadata(server: str, key: str) -> str:
  """An attribute of this virtual machine; "" where it has none or is none."""
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ""


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
  """Says what may be missing when what it encloses takes long, and ends the program in the end."""
  def hint():
    print(
      f"still waiting for {what}: is the same command running on every host, and may they reach "
      "that address and port through the firewall?", file=sys.stderr, flush=True,
    )

  def give_up():
    print(
      f"error: after {START_SECONDS} s some of {what}, are missing; {AGAIN}", file=sys.stderr,
      flush=True,
    )
    os._exit(1)

  timers = [threading.Timer(HINT_SECONDS, hint), threading.Timer(START_SECONDS, give_up)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()


def count() -> int:
  """How many hosts there are: processes, to be exact."""
  return jax.process_count()


def from_flags(flags: Any) -> None:
  """Starts as the flags of `host_flags`, attributes of an object, say."""
  start(*(getattr(flags, name) for name, *_ in host_flags.FLAGS))


def first() -> bool:
  """Whether this host is the one that writes and prints."""
  return jax.process_index() == 0


def name(index: int | None = None) -> str:
  """What a host is called: "host 1 of 4"; None is this one."""
  return f"host {jax.process_index() if index is None else index} of {jax.process_count()}"


def print_first(text: str) -> None:
  """Prints, on the first host alone."""
  if first():
    print(text, flush=True)


def any_host(flag: bool) -> bool:
  """Whether a flag is set on any host; all ask together."""
  return bool(flag) if count() == 1 else bool(gather(np.float32(flag)).any())


def gather(values: Any) -> np.ndarray:
  """What each host has, [hosts, ...]: numbers of one shape and dtype of at most 32 bits."""
  values = np.asarray(values)
  return values[None] if count() == 1 else multihost_utils.process_allgather(values)


def gather_texts(text: str) -> list[str]:
  """The text of each host, in their order."""
  if count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = gather(np.int32(len(data)))
  if not sizes.any():
    return [""] * count()
  padded = gather(np.pad(data, (0, sizes.max() - len(data))))
  return [row[:size].tobytes().decode() for row, size in zip(padded, sizes)]


def broadcast(value: Any) -> Any:
  """A JSON value of the first host, on all."""
  if count() == 1:
    return value
  return json.loads(gather_texts(json.dumps(value) if first() else "")[0])


def gather_rows(
  rows: Sequence[int], values: Mapping[str, np.ndarray], total: int
) -> dict[str, np.ndarray]:
  """Numbers of rows that lie on several hosts, whole on each.

  Args:
    rows: the rows whose numbers this host has.
    values: {name: [len(rows)] float32}; the same names on all.
    total: how many rows there are; each is some host's, and of several the first one's counts.

  Returns:
    {name: [total] float32}.
  """
  if count() == 1:
    # Where every row is here, only their order may differ.
    order = np.argsort(np.asarray(rows))
    return {name: np.asarray(value)[order] for name, value in values.items()}
  table = np.zeros((1 + len(values), total), np.float32)
  table[0, rows] = 1
  for line, value in zip(table[1:], values.values()):
    line[rows] = value
  tables = gather(table)
  owner = tables[:, 0].argmax(axis=0)
  found = tables[owner, :, np.arange(total)].T
  if not found[0].all():
    raise ValueError(f"rows {np.flatnonzero(found[0] == 0)[:5]} are on no host")
  return dict(zip(values, found[1:]))


def share(total: int) -> range:
  """The rows of `total` that this host takes over; where there are too few, some take the same."""
  return range(jax.process_index() % total, total, count())


@contextlib.contextmanager
def raise_on_all_hosts() -> Iterator[None]:
  """What fails on one host fails on all: an `InputError` within is raised by each of them.

  All hosts enter and leave it; within, each works for itself, without collective operations.

  Raises:
    InputError: of the first host that has one, whose number the others put before it.
  """
  own = ""
  try:
    yield
  except errors.InputError as error:
    if count() == 1:
      raise
    own = f"{type(error).__name__}:{error}"
  if count() == 1:
    return
  for index, told in enumerate(gather_texts(own)):
    if told:
      kind, _, text = told.partition(":")
      raise errors.KINDS[kind](text if told == own else f"{name(index)}: {text}")


def compare(config: Mapping[str, Any]) -> None:
  """Stops hosts that do not run the same.

  Args:
    config: what must be the same on all, nested; compared with the version of the code and of JAX.

  Raises:
    InputError: names the first host that differs from host 0, and the key.
  """
  if count() == 1:
    return
  own = {"the code": version(), "jax": jax.__version__} | {
    key: _short(value) for key, value in _flat(config).items()
  }
  everyone = [json.loads(text) for text in gather_texts(json.dumps(own, default=str))]
  for index, other in enumerate(everyone):
    for key in [*everyone[0], *other]:
      ours, theirs = everyone[0].get(key), other.get(key)
      if ours != theirs:
        raise errors.InputError(
          f"{name(index)} has {key}={theirs!r}, host 0 has {ours!r}; {AGAIN} and the same code"
        )


def _short(value: Any) -> Any:
  """A value, or where it is long, as many prompts are, a digest of it."""
  text = json.dumps(value, default=str)
  return value if len(text) <= 200 else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    inner = isinstance(value, Mapping)
    flat |= _flat(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
  return flat


def version() -> str:
  """The commit of the code, with "-dirty" where a file differs from it; "unknown" without git."""
  try:
    return subprocess.run(
      ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty",
       "--abbrev=40", "--exclude=*"],
      capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def run(main: Callable[[], Any], advice: Callable[[], str]) -> Any:
  """Runs a program whose other hosts may die: it then ends with one line and status 1.

  A collective operation that loses a host raises an error, which is caught here; a host that only
  falls silent is found after SILENCE_SECONDS by the runtime, which aborts the process.

  Args:
    main: the program, after `start`.
    advice: what it goes on from.

  Returns:
    What it returns.
  """
  if count() == 1:
    return main()
  lost = "another host no longer answers" if count() > 2 else (
    f"{name(1 - jax.process_index())} no longer answers"
  )
  words = f"error: {name()}: {lost}; {AGAIN}: {{}}"
  killed = f"error: {name()} was killed, or ended because {lost}; {AGAIN}: what it saved last stays"
  with _last_words(killed):
    try:
      return main()
    except Exception as error:
      # A save that failed because a host is lost comes as an InputError.
      if isinstance(error, errors.InputError) and not (
        isinstance(error, errors.Storage) and _is_loss(error)
      ):
        raise
      if not _is_loss(error):
        traceback.print_exc()
      else:
        print(words.format(advice()), file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: this host would wait for the others to end, and they for its next operation.
  os._exit(1)


def _is_loss(error: BaseException) -> bool:
  """Whether an error, or one that it comes from, says that a connection to a host broke."""
  words = ("Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|Connection (closed|reset)|coordination service|"
           "[Bb]arrier")
  while error is not None:
    if re.search(words, str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def _last_words(text: str) -> Iterator[None]:
  """Has another process say `text` if this one ends within, killed or aborted."""
  child = subprocess.Popen(
    [sys.executable, "-S", "-c", _LAST_WORDS, text], stdin=subprocess.PIPE, start_new_session=True
  )
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      child.communicate(b"ended")
