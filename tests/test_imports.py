"""Who may import whom, read from the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "unigrpo_jax"
# Room -> what it may import: rooms of the package, or libraries. Entry points import everything.
ARRAYS = {"jax", "chex", "flax.struct", "numpy"}
ROOMS = {
  "replacing": {"errors"},
  "resumption": {"errors", "optim"},
  "reporting": {"PIL", "errors", "intervals", "metrics"},
  "intervals": {"numpy"},
  "errors": set(),
  "types": ARRAYS,
  "losses": ARRAYS | {"types"},
  "sampling": ARRAYS | {"types", "errors"},
  "models": ARRAYS | {"flax", "types", "errors"},
  "data": {
    "numpy", "PIL", "transformers", "tokenizers", "tensorflow_datasets", "types", "errors",
    "models.config", "iconworld", "replacing",
  },
  "iconworld": {"numpy", "scipy", "PIL", "errors"},
  "contact_sheet": {"numpy", "PIL"},
  "rewards": {"numpy", "PIL", "errors", "iconworld"},
  "flops": set(),
  "hlo": {"hlo_flops", "hlo_loops", "hlo_text"},
  "hlo_flops": {"hlo_text"},
  "hlo_loops": {"hlo_text"},
  "hlo_text": set(),
  "host_flags": set(),
  "hosts": {"jax", "numpy", "errors", "host_flags"},
  "optim": {"jax", "optax"},
  "sharding": {"jax", "numpy", "flax", "errors"},
  "checkpoints": {"jax", "numpy", "orbax", "tensorstore", "errors"},
  "safetensors_io": {"numpy", "ml_dtypes", "errors"},
  "weights": {"jax", "numpy", "ml_dtypes", "errors", "safetensors_io"},
}
# Entry points, and what only they use.
FREE = {
  "__init__", "batches", "bench", "build", "checks", "compare", "config_files", "conversion",
  "convert", "corpus", "evaluate", "evaluation", "export", "feed", "finetune", "folders",
  "generate", "iconworld_evaluation", "metrics", "objective", "phases", "pipeline", "plan",
  "planning", "policy", "recipe", "report", "rollout", "runs", "step", "train", "update",
  "workloads",
}
STANDARD = {
  "__future__", "argparse", "ast", "asyncio", "base64", "collections", "concurrent", "contextlib",
  "dataclasses", "datetime", "difflib", "functools", "hashlib", "hmac", "html", "http", "importlib",
  "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "mmap", "numbers", "os",
  "pathlib", "random", "re", "secrets", "shutil", "signal", "socket", "statistics", "struct",
  "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "traceback", "typing",
  "unicodedata", "urllib", "warnings", "weakref", "zipfile",
}


every_file = pytest.mark.parametrize(
  "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)


def _imports(path):
  """Dotted names that a file imports, with `from a import b` as a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path):
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


@every_file
def test_a_room_imports_only_what_it_may(path):
  room = _room(path)
  assert room in ROOMS or room in FREE, f"say in this test what {room} may import"
  if room in FREE:
    return
  for name in _imports(path):
    own = name.removeprefix("unigrpo_jax.")
    allowed = {room} | ROOMS[room]
    known = name.split(".")[0] in STANDARD
    assert known or any(own == a or own.startswith(a + ".") for a in allowed), f"imports {name}"


@every_file
def test_nothing_forbidden_is_imported_and_no_file_is_long(path):
  for name in _imports(path):
    assert name.split(".")[0] not in {"torch", "tensorflow", "clu", "pickle"}, name
    assert not name.startswith("jax.experimental.pjit"), name
  assert len(path.read_text().splitlines()) <= 500, "split it by noun"
