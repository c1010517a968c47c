"""The program installed, without its clone: built, put into a new environment, and used there.

  pytest -m slow tests/test_installed.py   (takes the build tools from the package index)
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {path.name for path in (ROOT / "configs").glob("*.py")}
TRAINING = [
  "--config.steps=2", "--config.prompts_per_step=2", "--config.rollout.prompts_at_once=2",
  "--config.group_size=2", "--config.microbatch=4", "--config.epochs=1", "--config.text.chunk=16",
  "--config.rollout.max_tokens=16", "--config.rollout.num_timesteps=5",
  "--config.rollout.window_size=1", "--config.rollout.window_range=(0,2)",
  "--config.checkpoint_every=1", "--config.eval.every=2", "--config.eval.prompts=2",
  "--config.eval.batch_size=2", "--config.eval.num_timesteps=3",
]
MODES = "--config.eval.modes=('think',)"  # A comparison sets them itself.
SUPERVISED = [
  "--config.steps=2", "--config.sequences_per_step=2", "--config.microbatch=2",
  "--config.limits.images=2",
]
COMMANDS = {
  "train": ["--config=configs/unigrpo.py:tiny", "--workdir=run", *TRAINING, MODES],
  "train of sft": ["--config=configs/sft.py:tiny", "--workdir=sft", *SUPERVISED],
  "compare": [
    "--workdir=compared", "--methods", "TextGRPO", "--seeds", "0", "--prompts=6", "--ta_prompts=6",
    "--samples=1", *TRAINING,
  ],
  "build": ["--workdir=stages", "--out=built", "--vae_steps=2", "--vae_rows=2", *SUPERVISED],
  "bench": ["--device-check", "--toy", "--layers=2", "--repeats=1", "--json=bench.json"],
  "generate": ["--prompt=a red kite", "--out=kite.png", "--num_timesteps=3"],
  "evaluate": ["--prompts=2", "--modes", "plain", "--num_timesteps=3", "--out=evaluated"],
  "convert": ["--source=tiny", "--target=converted"],
  "export": ["run", "exported"],
  "report": ["run"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A copy of the sources, the sdist made of it, and the wheel made of that."""
  folder = tmp_path_factory.mktemp("built")
  shutil.copytree(
    ROOT, folder / "source",
    ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "out", "*.egg-info", "golden"),
  )
  python = _environment(folder / "tools")
  subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
  subprocess.run([python, "-m", "build", folder / "source"], check=True, stdout=subprocess.PIPE)
  [sdist], [wheel] = (list((folder / "source/dist").glob(f"*.{end}")) for end in ("tar.gz", "whl"))
  return {"source": folder / "source", "sdist": sdist, "wheel": wheel}


def _environment(folder, *packages):
  """The interpreter of a new environment, which has those of the folders `packages` as well."""
  subprocess.run([sys.executable, "-m", "venv", folder], check=True)
  site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
  (pathlib.Path(site) / "these.pth").write_text("\n".join(packages))
  return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
  """The interpreters of two environments, one with the sdist installed, one with the wheel."""
  folder = tmp_path_factory.mktemp("installed")
  pythons = {}
  for kind in ("sdist", "wheel"):
    pythons[kind] = _environment(folder / kind, sysconfig.get_path("purelib"))
    subprocess.run(
      [pythons[kind], "-m", "pip", "install", "--quiet", "--no-deps", built[kind]], check=True
    )
  return pythons


def _run(python, folder, command, *arguments):
  ours = "PYTHONPATH", "XLA_FLAGS"  # of conftest.py: eight devices
  environment = {key: value for key, value in os.environ.items() if key not in ours}
  return subprocess.run(
    [python, "-m", f"unigrpo_jax.{command}", *arguments], cwd=folder, env=environment,
    capture_output=True, text=True, timeout=1200,
  )


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package(built):
  files = {
    str(path.relative_to(built["source"])) for path in (built["source"] / "unigrpo_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  } | {f"unigrpo_jax/configs/{name}" for name in CONFIGS}
  names = zipfile.ZipFile(built["wheel"]).namelist()
  assert {name for name in names if ".dist-info/" not in name} == files


@pytest.mark.slow
def test_every_command_works_in_an_empty_folder(installed, tmp_path):
  for name, arguments in COMMANDS.items():
    done = _run(installed["wheel"], tmp_path, name.split()[0], *arguments)
    assert done.returncode == 0, (name, done.stderr[-2000:])
  for made in (
    "run/checkpoints", "sft/metrics.jsonl", "compared/results.md", "built", "bench.json",
    "kite.png", "evaluated/results.md", "converted/params", "exported", "run/report.html",
  ):
    assert (tmp_path / made).exists(), made


@pytest.mark.slow
def test_what_was_installed_from_the_sdist_is_the_same(installed):
  trees = []
  for python in installed.values():
    [site] = (python.parents[1] / "lib").glob("python*/site-packages")
    trees.append({
      str(path.relative_to(site)): path.read_bytes()
      for path in (site / "unigrpo_jax").rglob("*")
      if path.is_file() and path.suffix != ".pyc"
    })
  assert trees[0] == trees[1] and "unigrpo_jax/configs/unigrpo.py" in trees[0]


@pytest.mark.slow
def test_the_planner_reads_its_config_and_asks_for_the_compiler(installed, tmp_path):
  done = _run(
    installed["wheel"], tmp_path, "plan", "--config=configs/unigrpo.py", "--topology=v5p:2x2x1"
  )
  assert done.returncode == 2 and 'pip install "jax[tpu]"' in done.stderr, done.stderr
