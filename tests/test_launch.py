"""The launch scripts: what they print, refuse and do, with stand-ins for gcloud and for Python."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PLACE = ["--project=p", "--zone=z"]
TRAIN = ["--", "--config=configs/unigrpo.py:lora,cfg", "--workdir=bucket/runs/a"]
# Each with all it needs, and words that its printed commands must have.
DRY = {
  "tpu_vm create": (
    [*PLACE, "--type=v5p-128", "--spot"],
    ["tpu-vm create unigrpo --accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --spot"],
  ),
  "tpu_vm install": (
    [*PLACE, "--bucket=gs://b"],
    ["git bundle create", "tpu-vm scp", "--worker=all", "launch/host.sh install --bucket=b"],
  ),
  "tpu_vm run": (
    [*PLACE, "--bucket=b", *TRAIN],
    ["ssh unigrpo --worker=all", "host.sh start --bucket=b", "=configs/unigrpo.py:lora,cfg"],
  ),
  "tpu_vm logs": ([*PLACE, "--slices=2"], ["ssh unigrpo-0 --worker=0", "tail -n 100 -F"]),
  "tpu_vm stop": ([*PLACE], ["ssh unigrpo --worker=all", "launch/host.sh stop"]),
  "tpu_vm delete": (
    [*PLACE, "--name=n", "--slices=2"], ["tpu-vm delete n-0 --quiet", "tpu-vm delete n-1 --quiet"],
  ),
  "queued_resource create": (
    [*PLACE, "--type=v6e-64", "--slices=2"],
    ["create unigrpo --node-count=2 --node-prefix=unigrpo", "--runtime-version=v2-alpha-tpuv6e"],
  ),
  "queued_resource state": ([*PLACE], ["queued-resources describe unigrpo"]),
  "queued_resource delete": ([*PLACE], ["queued-resources delete unigrpo --force --quiet"]),
  "queued_resource keep": (
    [*PLACE, "--type=v5p-128", "--spot", "--bucket=b", *TRAIN],
    ["create unigrpo --node-id=unigrpo", "--spot", "host.sh install", "host.sh start"],
  ),
  "slurm": (
    ["--nodes=2", "--gpus=4", "--partition=q", *TRAIN],
    ["sbatch", "--nodes=2", "--ntasks-per-node=4", "--requeue", "--partition=q",
     "srun bash launch/host.sh run --backend=gpu", "--workdir=bucket/runs/a"],
  ),
  "rewards pickscore": (
    ["--port=9000", "--", "--warm"],
    ["VENV=.venv-pickscore REQUIREMENTS=zoo/requirements-pickscore.txt source launch/venv.sh",
     "--rewards pickscore=zoo.pickscore:PickScore --port=9000 --warm"],
  ),
  "rewards clip --selftest": (["--", "F"], ["+ .venv-clip/bin/python -m zoo.selftest F"]),
  "host install": ([], ["REQUIREMENTS=requirements-tpu.txt source launch/venv.sh"]),
  "host run": (
    ["--bucket=b", *TRAIN],
    ["gcsfuse", "--rename-dir-limit=0 b bucket", "-m unigrpo_jax.train --config=configs"],
  ),
}
BAD = {
  "tpu_vm": "give one of: create install",
  "tpu_vm fly": "'fly' is none of: create",
  "tpu_vm stop": "--project is missing",
  "tpu_vm stop --project=p": "--zone is missing",
  "tpu_vm stop --project": "--project has no value",
  "tpu_vm stop --project=": "--project is empty",
  "tpu_vm stop --projekt=p": "--projekt=p is no flag",
  "tpu_vm stop --fast": "--fast is no flag",
  "tpu_vm stop --project=p --zone=z --slices=two": "--slices=two",
  "tpu_vm create --project=p --zone=z": "--type is missing",
  "tpu_vm create --project=p --zone=z --type=h100-8": "--type=h100-8",
  "tpu_vm create --project=p --zone=z --type=v4-8 --slices=2": "--slices=2",
  "tpu_vm run --project=p --zone=z --bucket=b": "--config is missing",
  "tpu_vm run --project=p --zone=z --bucket=b -- --config=c": "--workdir is missing",
  "tpu_vm run --project=p --zone=z -- --config=c --workdir=bucket/a": "--bucket is missing",
  "tpu_vm run --project=p --zone=z --bucket=b -- --config=c --workdir=runs/a":
    "give --workdir=gs://...",
  "queued_resource keep --project=p --zone=z --type=v4-8": "--config is missing",
  "queued_resource keep --project=p --zone=z --type=v4-8 --poll=1m -- --config=c --workdir=gs://b":
    "--poll=1m is no number of seconds",
  "slurm": "--config is missing",
  "slurm --nodes=0 -- --config=c --workdir=w": "--nodes=0",
  "slurm run": "'run' is no flag",
  "rewards": "give the NAME",
  "rewards blip": "NAME=blip is no reward",
  "rewards clip --port=x": "--port=x is no number",
  "rewards hpsv2 --selftest": "--selftest is of",
  "host run": "--config is missing",
  "host install --backend=cpu": "--backend=cpu",
}


def _bash(script, *arguments, cwd=ROOT, path=None, **environment):
  return subprocess.run(
    ["bash", str(cwd / "launch" / f"{script}.sh"), *arguments], cwd=cwd, text=True, timeout=60,
    capture_output=True,
    env={
      **os.environ, "REQUIREMENTS": "", **environment,
      **({"PATH": f"{path}:{os.environ['PATH']}"} if path else {}),
    },
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
  subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_has_nothing_to_say():
  beside = str(pathlib.Path(sys.executable).parent)
  shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
  assert shellcheck, "pip install -r requirements-dev.txt brings it"
  found = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, text=True, capture_output=True)
  assert found.returncode == 0, found.stdout


def test_a_python_that_does_not_run_is_named():
  refused = _bash("rewards", "geneval", PYTHON="python9.9")
  assert refused.returncode == 2 and refused.stderr.count("\n") == 1
  assert "python9.9 does not run; set PYTHON to a Python of at least 3.10" in refused.stderr


def test_requirements_that_are_not_there_are_named():
  refused = _bash("host", "install", PYTHON=sys.executable, REQUIREMENTS="no.txt", VENV="/nowhere")
  assert refused.returncode == 2 and refused.stderr.startswith("error: REQUIREMENTS=no.txt is no")


def test_what_a_package_is_built_with_is_installed_before_it(tmp_path):
  shutil.copytree(LAUNCH, tmp_path / "launch")
  for name in ("requirements.txt", "of.txt", "of-first.txt"):
    (tmp_path / name).touch()
  python = tmp_path / "python"
  python.write_text(
    '#!/usr/bin/env bash\ncase "$*" in\n'
    '"-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
    '*" pip "*) echo "${@:6}" ;; esac\n'
  )
  python.chmod(0o755)
  done = _bash("venv", cwd=tmp_path, PYTHON=str(python), REQUIREMENTS="of.txt")
  assert done.stdout.splitlines()[1:] == ["-r of-first.txt", "--no-build-isolation -r of.txt"]


def test_cuda_13_is_chosen_by_its_requirements():
  for given, used in (("", "requirements-gpu.txt"), ("requirements-cuda13.txt",) * 2):
    done = _bash("host", "install", "--backend=gpu", "--dry-run", REQUIREMENTS=given)
    assert f"REQUIREMENTS={used} source" in done.stdout
  for name, extra in (("gpu", "cuda12"), ("cuda13", "cuda13"), ("tpu", "tpu")):
    text = (ROOT / f"requirements-{name}.txt").read_text()
    others = ["gcsfs>=2026.10"] if name == "tpu" else []
    assert text.split() == ["-r", "requirements.txt", f"jax[{extra}]", *others]


@pytest.fixture
def no_tools(tmp_path):
  """A PATH on which whatever would reach out leaves a trace."""
  for name in ("gcloud", "sbatch", "curl", "sudo", "gcsfuse"):
    (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / name).chmod(0o755)
  yield tmp_path
  assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("backend, python", [("gpu", ""), ("gpu", "old"), ("tpu", "old")])
def test_python_is_installed_only_on_tpu_vms_and_where_none_is_given(no_tools, backend, python):
  for name in ("old", "python3", "sleep"):
    (no_tools / name).write_text('#!/bin/sh\n[ "$2" = "" ] || [ "$1" = --version ]\n')
    (no_tools / name).chmod(0o755)
  refused = _bash("host", "install", f"--backend={backend}", path=no_tools, PYTHON=python)
  assert refused.returncode == 2, refused.stderr
  assert "is too old; set PYTHON to a Python of at least 3.11" in refused.stderr


def test_a_workdir_in_a_bucket_needs_no_mount(no_tools):
  arguments = ["--", "--config=configs/unigrpo.py", "--workdir=gs://b/runs/a"]
  done = _bash("tpu_vm", "run", "--dry-run", *PLACE, *arguments, path=no_tools)
  assert (done.returncode, done.stderr) == (0, "")
  assert f"host.sh start {' '.join(arguments)}" in done.stdout and "--bucket" not in done.stdout


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_prints_commands_and_runs_none(command, no_tools):
  script, *words = command.split()
  arguments, wanted = DRY[command]
  result = _bash(script, *words, "--dry-run", *arguments, path=no_tools)
  assert (result.returncode, result.stderr) == (0, "")
  assert all(line.startswith("+ ") for line in result.stdout.splitlines() if "gcloud" in line)
  for part in wanted:
    assert part in result.stdout


@pytest.mark.parametrize("command", BAD)
def test_bad_arguments_are_one_line(command, no_tools):
  script, *words = command.split()
  result = _bash(script, *words, path=no_tools)
  assert result.returncode == 2
  [line] = result.stderr.splitlines()
  assert line.startswith("error: ") and BAD[command] in line


@pytest.mark.parametrize("script", ["tpu_vm", "queued_resource", "slurm", "host", "rewards"])
def test_help_names_every_flag(script):
  told = _bash(script, "--help").stdout
  flags = re.search(r'^flags="(.*)"', (LAUNCH / f"{script}.sh").read_text(), re.MULTILINE)
  shared = ["name", "project", "zone", "type", "version", "bucket", "slices", "spot"]
  for flag in [*(flags[1].split() if flags else shared), "dry-run"]:
    assert f"--{flag}" in told


def test_a_printed_command_is_the_one_that_would_run():
  """Quoting survives two shells: the one here and the one of the host."""
  word = "--config.prompts.source=bucket/a b;$HOME'\""
  out = _bash("tpu_vm", "run", "--dry-run", *PLACE, "--bucket=b", *TRAIN, word).stdout
  [remote] = [part for part in shlex.split(out.removeprefix("+ ")) if part.startswith("--command=")]
  assert shlex.split(remote)[-3:] == [*TRAIN[1:], word]


def test_this_clone_is_installed_whatever_the_current_folder_is(tmp_path):
  for name, text in {"gcloud": "", "git": f"pwd -P >> {tmp_path}/places\n"}.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
    (tmp_path / name).chmod(0o755)
  subprocess.run(
    ["bash", LAUNCH / "tpu_vm.sh", "install", *PLACE], cwd=tmp_path, check=True,
    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
  )
  assert (tmp_path / "places").read_text().strip() == str(ROOT.resolve())


def test_a_slice_that_cannot_be_deleted_does_not_keep_the_others(tmp_path):
  (tmp_path / "gcloud").write_text(f'#!/bin/sh\necho "$5" >> {tmp_path}/calls\n[ "$5" != n-0 ]\n')
  (tmp_path / "gcloud").chmod(0o755)
  done = _bash("tpu_vm", "delete", *PLACE, "--name=n", "--slices=3", path=tmp_path)
  assert (tmp_path / "calls").read_text().split() == ["n-0", "n-1", "n-2"]
  assert done.returncode == 1


GCLOUD = r"""#!/usr/bin/env bash
# Says what the next line of a file says where it is asked for a state, and records all.
cd "$(dirname "$0")"
echo "$*" >> calls
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*) answer=$(next states); echo "$answer"; [ "$answer" != NOT_FOUND ] ;;
  *"host.sh status"*) next runs ;;
esac
"""


def _keep(folder, states, runs):
  for name, text in {"gcloud": GCLOUD, "git": "#!/bin/sh\n"}.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  (folder / "states").write_text("\n".join(states) + "\n")
  (folder / "runs").write_text("\n".join(runs) + "\n")
  result = _bash(
    "queued_resource", "keep", *PLACE, "--type=v5p-128", "--spot", "--bucket=b", "--poll=0", *TRAIN,
    path=folder,
  )
  kinds = {"queued-resources create": "create", "queued-resources delete": "delete",
           "host.sh install": "install", "host.sh start": "start", "host.sh stop": "stop"}
  calls = (folder / "calls").read_text().splitlines()
  return result, [kind for call in calls for words, kind in kinds.items() if words in call]


def test_keep_goes_on_where_tpus_are_taken_away(tmp_path):
  result, done = _keep(
    tmp_path,
    ["NOT_FOUND", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", "NOT_FOUND", "ACTIVE",
     "ACTIVE"],
    ["none", "running", "none", "ended 0"],
  )
  assert result.returncode == 0, result.stderr
  assert done == ["create", "install", "start", "delete", "create", "install", "start"]


def test_keep_starts_a_broken_run_again_but_not_a_refused_one(tmp_path):
  result, done = _keep(
    tmp_path, ["ACTIVE"] * 5, ["ended 0", "running", "", "ended 134", "ended 2"]
  )
  assert result.returncode == 2 and "refused" in result.stderr
  # An end that is older than this run counts for nothing; neither does a host that is silent.
  assert done == ["install", "start", "stop", "install", "start"]


PYTHON = r"""#!/usr/bin/env bash
# Stands for python3 and for that of .venv: installs nothing, and trains as $TRAINING says.
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m unigrpo_jax.train "*) shift 2; echo "training $* ${LIBTPU_INIT_ARGS:0:9}"; eval "$TRAINING" ;;
esac
"""
SAVES = 'trap "echo stopped by a signal at step 3; exit 0" TERM; while sleep 0.1; do :; done'


@pytest.fixture
def clone(tmp_path):
  """What a host has, with a stand-in for Python."""
  shutil.copytree(LAUNCH, tmp_path / "launch")
  for name in ("requirements.txt", "requirements-tpu.txt", "requirements-gpu.txt"):
    shutil.copy(ROOT / name, tmp_path)
  (tmp_path / "python").write_text(PYTHON)
  (tmp_path / "python").chmod(0o755)
  return tmp_path


def _host(clone, *arguments, training="true"):
  return _bash(
    "host", *arguments, cwd=clone, TRAINING=training, PYTHON=str(clone / "python"), HOME=str(clone)
  )


@pytest.mark.parametrize("training, status", [
  ("true", 0), ("exit 2", 2), ("exit 134", 134), ("echo stopped by a signal at step 3", 75),
])
def test_a_host_ends_as_its_training_does_but_a_stopped_run_is_not_finished(
  clone, training, status
):
  result = _host(clone, "run", *TRAIN, training=training)
  assert result.returncode == status, result.stderr
  # With the arguments, and with the flags of env.sh.
  assert f"training {' '.join(TRAIN[1:])} --xla" in result.stdout
  assert f"== ended with status {status}" in result.stdout


def test_an_environment_of_another_python_is_not_taken(clone):
  (clone / ".venv/bin").mkdir(parents=True)
  for path, version in ((clone / ".venv/bin/python", "3.11"), (clone / "python", "3.13")):
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
  done = _host(clone, "install")
  assert done.returncode == 2, done.stderr
  assert f"error: .venv has Python 3.11, PYTHON={clone}/python is 3.13; remove" in done.stderr


def _until(holds, seconds=20):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_a_signal_to_a_host_saves_the_run(clone):
  with subprocess.Popen(
    ["bash", "launch/host.sh", "run", *TRAIN], cwd=clone, text=True, stdout=subprocess.PIPE,
    env={**os.environ, "TRAINING": SAVES, "PYTHON": str(clone / "python")},
  ) as process:
    for line in process.stdout:
      if line.startswith("training"):
        break
    time.sleep(0.3)  # Until the stand-in has set its trap.
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
  assert process.returncode == 75 and "stopped by a signal at step 3" in rest


def test_a_run_in_the_background_is_started_once_and_stopped(clone):
  status = lambda: _host(clone, "status").stdout.strip()
  assert status() == "none"
  started = _host(clone, "start", *TRAIN, training=SAVES)
  assert started.returncode == 0, started.stderr
  log = clone / "unigrpo.log"
  _until(lambda: "training" in log.read_text())
  assert status() == "running"
  pid = (clone / "unigrpo.pid").read_text()
  assert "already running" in _host(clone, "start", *TRAIN, training=SAVES).stdout
  assert (clone / "unigrpo.pid").read_text() == pid
  time.sleep(0.3)
  assert _host(clone, "stop").returncode == 0
  assert status() == "ended 75"
  assert "nothing runs" in _host(clone, "stop").stdout


def test_a_run_that_is_stopped_while_it_installs_is_not_finished(clone):
  python = clone / "python"
  python.write_text(PYTHON.replace("mkdir -p", "touch installs; exec sleep 20; mkdir -p"))
  assert _host(clone, "start", *TRAIN).returncode == 0
  _until((clone / "installs").exists)
  assert _host(clone, "stop").returncode == 0
  assert _host(clone, "status").stdout.strip() == "ended 143"


def test_the_log_of_a_run_that_broke_is_kept_when_it_starts_again(clone):
  for training, status in (("echo why; exit 1", "ended 1"), ("true", "ended 0")):
    assert _host(clone, "start", *TRAIN, training=training).returncode == 0
    _until(lambda ends=status: _host(clone, "status").stdout.strip() == ends)
  log = (clone / "unigrpo.log").read_text()
  assert "why" in log and "ended with status 0" in log


@pytest.mark.parametrize("status, restarts, requeued", [
  (0, "0", False), (1, "", True), (2, "0", False), (75, "9", True), (137, "0", True),
  (1, "1000", False),
])
def test_a_slurm_job_queues_again_unless_it_is_done_or_refused(
  tmp_path, status, restarts, requeued
):
  (tmp_path / "launch").mkdir()
  for name in ("slurm.sh", "shell.sh"):
    (tmp_path / "launch" / name).write_text((LAUNCH / name).read_text())
  (tmp_path / "launch/host.sh").write_text("true")
  for name, text in {
    "sbatch": 'exec bash -c "${@: -1}"', "srun": f"exit {status}", "scontrol": 'echo "again: $*"',
  }.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  result = _bash(
    "slurm", *TRAIN, cwd=tmp_path, path=tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts
  )
  assert result.returncode == status, result.stderr
  assert ("again: requeue 7" in result.stdout) == requeued
