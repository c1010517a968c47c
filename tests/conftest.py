"""Eight fake CPU devices for every test, and the recorded tiny BAGEL."""

import contextlib
import functools
import gc
from importlib import metadata
import json
import os
import pathlib

# Before anything imports jax: the device count is fixed when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's CPU runtime has this many threads, else one a core. A thread that waits for other devices in
# a collective is blocked: two of them would wait for ever for what needs a third.
os.environ.setdefault("NPROC", "32")
# Without the second flag, eight devices on a few cores may start independent collectives of one
# program in different orders, and wait for each other until they are killed.
_FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_cpu_enable_concurrency_optimized_scheduler=false",
  # On a busy machine a device may wait long for the others; 40 s, the default, ends the process.
  "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  # Compiled code that is not fast, but soon there.
  "--xla_backend_optimization_level=0",
  # A process ends at a flag that it does not know: this one is gone from jaxlib 0.12.
  *["--xla_cpu_use_fusion_emitters=false"] * metadata.version("jaxlib").startswith("0.10."),
)
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *(f for f in _FLAGS if f.split("=")[0] not in _GIVEN)])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from tests import reward_requests  # noqa: E402
from tests import shallow as shallow_model  # noqa: E402
from unigrpo_jax.models import bagel  # noqa: E402
from unigrpo_jax.models import config as config_lib  # noqa: E402
from unigrpo_jax.runtime import folders  # noqa: E402


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """Folder of the recorded reference outputs: a complete tiny BAGEL in the official format."""
  return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_rewards() -> pathlib.Path:
  """Folder of the recorded reference outputs of rewards."""
  return pathlib.Path(__file__).parent / "golden_rewards"


@pytest.fixture
def scripted():
  """Starts servers with scripted answers; see `reward_requests.scripted`."""
  with contextlib.ExitStack() as stack:
    yield functools.partial(reward_requests.scripted, stack)


@pytest.fixture
def serving():
  """Starts servers of rewards; see `reward_requests.serving`."""
  with contextlib.ExitStack() as stack:
    yield functools.partial(reward_requests.serving, stack)


@pytest.fixture(scope="session")
def config(golden) -> config_lib.BagelConfig:
  return config_lib.read_config(golden)


@pytest.fixture(scope="session")
def params(golden):
  """{"bagel", "vae"}: the golden weights in float32."""
  return folders.open_folder(golden).load_params(dtype=jnp.float32)


@pytest.fixture(scope="session")
def model(golden, config) -> bagel.Bagel:
  """The network of `params["bagel"]`, computing in float32."""
  ids = json.loads((golden / config_lib.BAGEL_FILE).read_text())["special_token_ids"]
  return bagel.Bagel(config, (ids["start_of_image"], ids["end_of_image"]), dtype=jnp.float32)


@pytest.fixture(scope="session")
def small(model):
  """`model` whose backward pass computes nothing again, which compiles sooner."""
  return model.clone(remat="none")


@pytest.fixture(scope="module")
def experience(small, params):
  """Four prompts, two trajectories each; see `joint.sample`."""
  from tests import joint

  return joint.sample(small, params["bagel"])


@pytest.fixture(scope="module")
def run(small, params):
  """The update of such an experience; see `joint.runner`."""
  from tests import joint

  return joint.runner(small, params["bagel"])


@pytest.fixture(scope="session")
def shallow(tmp_path_factory) -> pathlib.Path:
  """Folder of the embedded BAGEL cut to two layers, which compile sooner than five."""
  if not folders.TINY_FOLDER.is_dir():
    pytest.skip("the embedded checkpoint is missing")
  return shallow_model.make(tmp_path_factory.mktemp("shallow"))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Drops compiled programs before there are too many.

  Each keeps some memory mappings, of which Linux gives a process 65,530: the compiler crashes when
  it gets no more.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilations():
  """A list that grows by one with every program that XLA compiles."""
  events = []

  def listen(name, seconds, **_):
    if name.endswith("backend_compile_duration"):
      events.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)


def pytest_configure(config):
  # Tracing makes many objects that stay. By default all that live would be looked at over and over
  # for cycles.
  gc.freeze()
  gc.set_threshold(50_000, 10, 10)
  # Compiled programs are kept where pytest keeps its own cache: one is compiled once, whichever
  # worker, test or process that a test starts needs it, and a second run is quick. Of short ones,
  # keeping takes longer than compiling.
  cache = getattr(config, "cache", None)
  if cache is not None:
    for name, value in (
      ("jax_compilation_cache_dir", str(cache.mkdir("jax"))),
      ("jax_persistent_cache_min_compile_time_secs", 0.5),
    ):
      jax.config.update(name, value)
      os.environ[name.upper()] = str(value)
