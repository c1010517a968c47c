"""Who may import whom, read from every file of the package; no file is exempt.

A room is a folder or a file at the package's top; it imports only rooms to its left in ORDER, and
only the libraries of LIBRARIES. Entry points are the files with a `__main__` block at the top:
nothing imports one, and they may import every room.
"""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "unigrpo_jax"
# Rooms from left to right; those of one line do not import each other.
ORDER = (
  ("errors", "types"),
  ("geneval", "losses"),
  ("iconworld",),
  ("sampling",),
  ("models",),
  ("data",),
  ("runtime",),
  ("episodes", "rewards"),
  ("reward_models",),
  ("algorithms",),
  ("supervised", "benchmarks"),
  ("recipe",),
  ("finetune",),
  ("tools",),
)
ENTRY_POINTS = {
  "train", "generate", "evaluate", "convert", "export", "build", "report", "compare", "bench",
  "plan", "reward_model", "serve",
}
LIBRARIES = {
  "errors": set(),
  "types": {"jax", "chex", "flax.struct"},
  "geneval": {"numpy"},
  "iconworld": {"numpy", "scipy", "PIL"},
  "losses": {"jax", "chex"},
  "sampling": {"jax", "chex", "flax.struct", "numpy"},
  "models": {"jax", "chex", "flax", "numpy", "ml_dtypes"},
  "data": {
    "numpy", "PIL", "transformers", "tokenizers", "tensorflow_datasets", "etils", "fsspec", "gcsfs",
    "aiohttp", "tqdm", "pyarrow",
  },
  "runtime": {
    "jax", "numpy", "flax", "optax", "orbax", "tensorstore", "tensorboardX", "wandb",
    "huggingface_hub",
    "etils",
  },
  "episodes": {"jax", "numpy", "flax.struct"},
  "reward_models": {"jax", "numpy", "flax", "scipy", "PIL", "tokenizers"},
  "algorithms": {"jax", "numpy", "flax.struct", "optax"},
  "rewards": {"numpy", "PIL", "rapidocr_onnxruntime", "threadpoolctl"},
  "supervised": {"jax", "numpy", "PIL", "optax"},
  "benchmarks": {"numpy", "PIL", "scipy"},
  "recipe": {"jax", "numpy", "optax", "absl", "ml_collections"},
  "finetune": {"jax", "numpy"},
  "tools": {"jax", "numpy", "optax", "PIL", "matplotlib", "jinja2", "ml_collections", "tqdm"},
  "entry point": {"jax", "numpy"},
}
# Of a room, what may be imported of a library or of another room only there.
ONLY_IN = {
  "ml_collections": {"recipe", "tools"},
  "unigrpo_jax.runtime.hosts": {
    "runtime", "benchmarks", "finetune", "tools", "entry point",
  },
}
FORBIDDEN = {"torch", "tensorflow", "clu", "pickle"}

RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize(
  "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
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


def _rooms_of(path):
  """The rooms of the package that a file imports, its own left out."""
  names = [name.split(".") for name in _imports(path)]
  return {parts[1] for parts in names if parts[0] == "unigrpo_jax"} - {_room(path)}


@every_file
def test_a_room_imports_only_rooms_to_its_left_and_its_libraries(path):
  room = _room(path)
  if path == PACKAGE / "__init__.py":
    assert not list(_imports(path))
    return
  entry = room in ENTRY_POINTS
  assert entry or room in RANK, f"say in this test where {room} stands"
  for other in _rooms_of(path):
    assert other not in ENTRY_POINTS, f"{room} imports the entry point {other}"
    assert entry or RANK[other] < RANK[room], f"{room} imports {other}, which is not to its left"
  kind = "entry point" if entry else room
  allowed = LIBRARIES[kind] | {"unigrpo_jax"}
  for name in _imports(path):
    top = name.split(".")[0]
    assert top in sys.stdlib_module_names or top == "__future__" or any(
      name == library or name.startswith(library + ".") for library in allowed
    ), f"{room} imports {name}"
    for restricted, rooms in ONLY_IN.items():
      assert not name.startswith(restricted) or kind in rooms, f"{room} imports {name}"


@every_file
def test_nothing_forbidden_is_imported_and_no_file_is_long(path):
  for name in _imports(path):
    assert name.split(".")[0] not in FORBIDDEN, name
    assert not name.startswith("jax.experimental.pjit"), name
  assert len(path.read_text().splitlines()) <= 500, "split it by noun"


def test_entry_points_are_what_runs():
  runs = {
    path.stem for path in PACKAGE.glob("*.py")
    if re.search(r"\n  errors\.report\((\w+\.)?main\)", path.read_text())
  }
  assert runs == ENTRY_POINTS


def test_there_are_few_rooms_and_arrows(capsys):
  arrows = {(_room(path), other) for path in FILES for other in _rooms_of(path)}
  rooms = {_room(path) for path in FILES if path.name != "__init__.py"}
  with capsys.disabled():
    print(f"\n{len(rooms)} rooms, {len(arrows)} arrows")
    for room in sorted(rooms):
      print(f"  {room:12} -> {' '.join(sorted(b for a, b in arrows if a == room))}")
  assert len(rooms) <= 30
  assert len(arrows) <= 130
