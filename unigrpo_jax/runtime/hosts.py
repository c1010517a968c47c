"""Several hosts as one program: connecting them, what they agree on, and what ends them together.

Whatever decides what runs next (a signal, an error, a score) is made known to all hosts first: one
that took another branch would leave the others in a collective operation that never completes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
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
import urllib.request

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import locks
from unigrpo_jax.runtime import host_flags, sharding

HINT_SECONDS = 60
START_SECONDS = 900  # Machines of a pod may be created one after the other.
SILENCE_SECONDS = 100  # Then a host is dead. Moving a virtual machine takes some tens of seconds.
END_SECONDS = 60  # The first host to end waits so long for the others.
AGAIN = "start all hosts again with the same command"
# A process beside the program: when the runtime finds a dead host it aborts in native code, where
# no Python handler runs.
_PRINT_UNLESS_ENDED = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
_LOST_CONNECTION = re.compile(
  "Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|Connection (closed|reset)|coordination service|[Bb]arrier"
)


def start(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Connects the hosts where there are several; before anything else that uses a device.

  The arguments are HOST:PORT of process 0, how many there are, and which of them this is, from 0.
  Without them, the hosts of a cluster that JAX recognises are connected; a single machine connects
  nothing.

  Raises:
    InputError: the three do not fit together.
  """
  given = (coordinator, processes, process)
  if given == (None, None, None):
    if not in_cluster(os.environ):
      return
  elif None in given:
    raise errors.InputError("give all of --coordinator, --processes and --process, or none")
  else:
    address, _, port = coordinator.rpartition(":")
    if not address or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
      raise errors.InputError(f"--coordinator={coordinator} must be HOST:PORT, a port up to 65535")
    errors.require("--processes", processes, low=1)
    errors.require("--process", process, low=0, high=processes - 1)
  # JAX's own handler would swallow a SIGTERM that comes before the run's handler is set.
  jax.config.update("jax_enable_preemption_service", False)
  # Two programs that a CPU runs at once mix up their messages on the same connection.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  at = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "the address the cluster gives")
  with _time_limit(f"{processes or 'all'} hosts, the first of them at {at}"):
    jax.distributed.initialize(
      *given, initialization_timeout=2 * START_SECONDS,  # _time_limit ends it, with one line
      heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=END_SECONDS,
    )
    devices = jax.local_device_count()
  print(f"{name()}: {socket.gethostname()}, {devices} local device(s)", flush=True)


def from_flags(flags: Any) -> None:
  """Calls `start` with the flags of `host_flags`, attributes of `flags`."""
  start(*(getattr(flags, flag) for flag, *_ in host_flags.FLAGS))


def in_cluster(environ: Mapping[str, str]) -> bool:
  """Whether the environment is of one of several hosts that JAX connects by itself: tasks of a
  SLURM job step, or workers or slices of TPUs (GKE's variables, or the metadata of a TPU VM).
  """
  number = lambda key: int(environ.get(key) or 1)
  if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ and number("SLURM_NTASKS") > 1:
    return True
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
  if "," in workers or number("MEGASCALE_NUM_SLICES") > 1:
    return True
  # Only the metadata server knows a TPU VM's neighbours. JAX sets this where there is no TPU.
  if environ.get("TPU_SKIP_MDS_QUERY") or environ.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
    return False
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  several_slices = re.compile(r"^MEGASCALE_NUM_SLICES(?!: '1'\s*$)", re.MULTILINE)
  return (
    "," in _metadata(server, "worker-network-endpoints")
    or several_slices.search(_metadata(server, "tpu-env")) is not None
  )


def _metadata(server: str, key: str) -> str:
  """An attribute of this virtual machine; "" where there is no such attribute or machine."""
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as response:
      return response.read().decode()
  except OSError:
    return ""


@contextlib.contextmanager
def _time_limit(awaited: str) -> Iterator[None]:
  """Prints a hint when connecting takes HINT_SECONDS; ends the program after START_SECONDS."""
  connected = threading.Event()

  def watch():
    if connected.wait(HINT_SECONDS):
      return
    print(
      f"still waiting for {awaited}: is the same command running on every host, and may they reach "
      "that address and port through the firewall?", file=sys.stderr, flush=True,
    )
    if not connected.wait(START_SECONDS - HINT_SECONDS):
      text = f"error: after {START_SECONDS} s some of {awaited}, are missing; {AGAIN}"
      print(text, file=sys.stderr, flush=True)
      os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    connected.set()


def count() -> int:
  """How many hosts there are, to be exact: processes."""
  return jax.process_count()


def first() -> bool:
  """Whether this host is the one that writes and prints."""
  return jax.process_index() == 0


def name(index: int | None = None) -> str:
  """A host in messages: "host 1 of 4"; None is this one."""
  return f"host {jax.process_index() if index is None else index} of {count()}"


def print_first(text: str) -> None:
  """Prints, on the first host alone."""
  if first():
    print(text, flush=True)


def gather(values: Any) -> np.ndarray:
  """The values of every host, [hosts, ...]: one shape, and one dtype of at most 32 bits."""
  return np.asarray(values)[None] if count() == 1 else multihost_utils.process_allgather(values)


def any_host(flag: bool) -> bool:
  """Whether a flag is set on any host. It waits for all; in a loop of steps use `AgreedFlag`."""
  return bool(gather(np.float32(flag)).any())


class AgreedFlag:
  """A flag that all hosts see alike, one post later, without waiting for each other.

    for batch in batches:
      flag.post(signalled)            # on every host, in the same order among its programs
      state = step(state, batch)
      if flag.read():
        break

  `any_host` waits until the devices have finished every step dispatched so far. Here the reduction
  is one more program in their queue, and `read` asks for that of the post before, which ran ahead
  of the previous step. On one host there is no program, and `read` gives the latest post.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._sharding = sharding.along_all(mesh)
    self._any = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
    self._previous, self._latest = False, False

  def post(self, flag: bool) -> None:
    """Dispatches the reduction over all hosts' flags."""
    self._previous, self._latest = self._latest, bool(flag)
    if count() > 1:
      flags = np.full(self._sharding.mesh.size, flag, np.int32)  # this host's part of it is used
      self._latest = self._any(sharding.put(flags, self._sharding))

  def read(self) -> bool:
    """Whether any host set its flag in the post before the latest."""
    return bool(jax.device_get(self._previous if count() > 1 else self._latest))


def gather_texts(text: str) -> list[str]:
  """The text of each host, in their order; of any lengths, which the collective does not allow."""
  encoded = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
  sizes = gather(np.int32(len(encoded)))
  if not sizes.any():
    return [""] * count()
  padded = gather(_padded(encoded, sizes.max()))
  return [row[:size].tobytes().decode(errors="surrogatepass") for row, size in zip(padded, sizes)]


def broadcast(value: Any) -> Any:
  """A JSON value of the first host, on all."""
  if count() == 1:
    return value
  encoded = np.frombuffer(json.dumps(value).encode() if first() else b"", np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
  padded = multihost_utils.broadcast_one_to_all(_padded(encoded, size))
  return json.loads(np.asarray(padded)[:size].tobytes())


def _padded(array: np.ndarray, size: int) -> np.ndarray:
  """An array of at most `size` numbers, followed by zeros. There are few lengths, powers of two,
  since each is another program of a collective."""
  return np.pad(array, (0, (1 << (int(size) - 1).bit_length()) - len(array)))


def gather_rows(
  rows: Sequence[int], values: Mapping[str, np.ndarray], total: int
) -> dict[str, np.ndarray]:
  """Values of `total` rows that are spread over several hosts, complete on each.

  This host has {name: [len(rows)] float32} of `rows`; all hosts have the same names, and the first
  host that has a row counts. Returns {name: [total] float32}.
  """
  if count() == 1:
    # All rows are here; only their order may differ.
    order = np.argsort(np.asarray(rows))
    return {key: np.asarray(value)[order] for key, value in values.items()}
  table = np.zeros((1 + len(values), total), np.float32)  # the first line: which rows are here
  table[:, rows] = [np.ones(len(rows)), *values.values()]
  tables = gather(table)
  owners = tables[:, 0].argmax(axis=0)
  present, *gathered = tables[owners, :, np.arange(total)].T
  if not present.all():
    raise ValueError(f"rows {np.flatnonzero(present == 0)[:5]} are on no host")
  return dict(zip(values, gathered))


def share(total: int) -> range:
  """The rows of `total` that this host works on; with more hosts than rows, some share a row."""
  return range(jax.process_index() % total, total, count())


@contextlib.contextmanager
def raise_on_all_hosts() -> Iterator[None]:
  """Raises the `InputError` of the first host that has one within on all; others add its number.
  An `OSError` of a file becomes one, see `errors.storage`.

  All hosts enter and leave it; within, each works on its own, without collective operations.
  """
  local = ""
  try:
    with errors.storage(did="used"):
      yield
  except errors.InputError as error:
    if count() == 1:
      raise
    local = f"{type(error).__name__}:{error}"
  for index, reported in enumerate(gather_texts(local)):
    if reported:
      kind, _, message = reported.partition(":")
      raise errors.KINDS[kind](message if reported == local else f"{name(index)}: {message}")


@contextlib.contextmanager
def hold(folder: pathlib.Path, flag: str) -> Iterator[None]:
  """Within, no other program that asks for it writes into the folder, which messages call `flag`.

  The first host holds its lock, for all.

  Raises:
    InputError: another program does; says which.
  """
  with contextlib.ExitStack() as stack:
    with raise_on_all_hosts():
      if first():
        stack.enter_context(locks.hold(locks.inside(folder), f"{flag}={folder}"))
    yield


def holds_workdir(train: Callable[..., Any]) -> Callable[..., Any]:
  """`train(config, workdir, devices=None)`, which holds its workdir until it returns or raises; it
  stays that folder where a reward changes the current one."""
  @functools.wraps(train)
  def alone(config, workdir, devices=None):
    with hold(workdir, "--workdir"):
      return train(config, workdir.absolute(), devices)

  return alone


def compare(config: Mapping[str, Any]) -> None:
  """Raises InputError unless all hosts have the same nested `config`, and versions of code and JAX.
  """
  if count() == 1:
    return
  values = {"the code": code_version(), "jax": jax.__version__}
  for key, value in traverse_util.flatten_dict(dict(config), sep=".").items():
    text = json.dumps(value, default=str)
    is_long = len(text) > 200  # a list of prompts, say
    values[key] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if is_long else value
  reference, *others = map(json.loads, gather_texts(json.dumps(values, default=str)))
  for index, other in enumerate(others, 1):
    for key in reference | other:
      here, there = reference.get(key), other.get(key)
      if here != there:
        raise errors.InputError(
          f"{name(index)} has {key}={there!r}, host 0 has {here!r}; {AGAIN} and the same code"
        )


def code_version() -> str:
  """The commit of the code, with "-dirty" where a file differs from it; "unknown" without git.

  Nor is it known of an installation within a repository of something else.
  """
  file = pathlib.Path(__file__)

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", file.name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def run(main: Callable[[], Any], advice: Callable[[], str]) -> Any:
  """Runs `main`, after `start`; when another host dies, it ends with one line and status 1.

  The line ends in `advice`: from where a restart continues. A collective operation that loses a
  host raises an error; a silent host is found after SILENCE_SECONDS by the runtime, which aborts.
  """
  if count() == 1:
    return main()
  other = name(1 - jax.process_index()) if count() == 2 else "another host"
  lost = f"{other} no longer answers; {AGAIN}"
  killed = f"error: {name()} was killed, or ended because {lost}: the last checkpoint stays"
  with _print_if_killed(killed):
    try:
      return main()
    except Exception as error:
      if _is_host_loss(error):
        print(f"error: {name()}: {lost}: {advice()}", file=sys.stderr)
      elif isinstance(error, errors.InputError):
        raise
      elif isinstance(error, OSError) and error.filename is not None:
        print(f"error: {name()}: {errors.of_storage(error)}", file=sys.stderr)
      else:
        traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: this host would wait for the others to end, and they for its next operation.
  os._exit(1)


def _is_host_loss(error: BaseException | None) -> bool:
  """Whether an error, or one that it comes from, says that a connection to a host broke."""
  # Of a user's errors, only that of a save may come from a lost host.
  if isinstance(error, errors.InputError) and not isinstance(error, errors.Storage):
    return False
  while error is not None:
    if _LOST_CONNECTION.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def _print_if_killed(text: str) -> Iterator[None]:
  """Has another process print `text` if this one is killed or aborts within."""
  command = [sys.executable, "-S", "-c", _PRINT_UNLESS_ENDED, text]
  child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      child.communicate(b"ended")
