"""Kills a small training run, its evaluations, its exports and conversions at random moments:

  python -m tests.torture.kills --folder=FOLDER --kills=100
  python -m tests.torture.kills --folder=FOLDER --kills=50 --signal=TERM
  python -m tests.torture.kills --folder=FOLDER --kills=500 --what=toy

In rounds: a run is trained, exported, converted, converted back and evaluated, and each of these is
killed again and again until it ends by itself. Every end must be, bit for bit, that of commands
that nothing killed. With TERM, each command must end by itself within SECONDS, a training run with
status 0. `toy` is a run without a network (`toy.py`), cheap enough for many kills. A file of FOLDER
counts; the same command continues it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import signal
import statistics
import sys
import time

from tests import shallow
from tests.torture import small

STEPS = 8
SECONDS = 30
VOLATILE = ("seconds/", "share/", "trajectories_per_second")
# Where to kill which command, and how often it is tried there; "start" is before the first phase.
MOMENTS = {
  "toy": {"start": 1, "step": 3, "save": 5, "evaluation": 2},
  "train": {"start": 2, "step": 4, "save": 4, "evaluation": 3, "export": 1},
  "export": {"start": 1, "export": 3},
  "convert": {"start": 1, "conversion": 3},
  "back": {"start": 1, "end": 1},
  "evaluate": {"start": 1, "evaluation": 3},
}
# To kill, a round.
ATTEMPTS = {"toy": 100, "train": 60, "export": 2, "convert": 3, "back": 1, "evaluate": 2}


@dataclasses.dataclass
class Round:
  """The folders of a round, and its commands by name, in their order."""

  place: pathlib.Path
  init_from: pathlib.Path | None  # None: of the toy

  def jobs(self) -> dict[str, small.Job]:
    if self.init_from is None:
      return {"toy": small.Job("tests.torture.toy", (str(self.place / "run"),))}
    run, out, exported, converted, back, evaluated = (
      str(self.place / name) for name in
      ("run", "out", "exported", "converted", "back", "evaluated")
    )
    return {
      "train": small.training(run, self.init_from, out, STEPS),
      "export": small.Job("unigrpo_jax.export", (run, exported, "--overwrite")),
      "convert": small.Job(
        "unigrpo_jax.convert", (f"--source={out}", f"--target={converted}", "--overwrite")
      ),
      "back": small.Job(
        "unigrpo_jax.convert",
        (f"--source={converted}", f"--target={back}", "--export", "--overwrite"),
      ),
      "evaluate": small.Job("unigrpo_jax.evaluate", (
        # As named in the results, which are the same in all rounds.
        "--checkpoint=out", f"--out={evaluated}", "--prompts=2", "--modes", "think",
        "--batch_size=2", "--num_timesteps=4", "--max_tokens=6", "--keep=1",
      ), folder=str(self.place)),
    }

  def result(self) -> dict[str, str]:
    """What must be equal: {name: digest} of files and of the log's rows without times."""
    files = {}
    for name in ("out", "exported", "back", "evaluated", "run/evaluations", "run/final.npy"):
      place = self.place / name
      for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.is_file():
          files[str(path.relative_to(self.place))] = _digest(path.read_bytes())
    rows = [json.loads(line) for line in (self.place / "run/metrics.jsonl").open(encoding="utf-8")]
    files["run/metrics.jsonl"] = _digest(json.dumps([
      {key: value for key, value in row.items() if not key.startswith(VOLATILE)} for row in rows
    ]).encode())
    kept = sorted(path.name for path in (self.place / "run/checkpoints").iterdir())
    return files | {"run/checkpoints": " ".join(kept)}

  def litter(self) -> list[str]:
    """What killed commands left behind for good."""
    return sorted(
      str(path.relative_to(self.place)) for path in self.place.rglob("*")
      if ".partial-" in path.name or path.name.endswith("lock.json") or "-tmp" in path.name
    )


def _digest(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=12).hexdigest()


def make_model(folder: pathlib.Path, server) -> pathlib.Path:
  """The model that is trained; made once, in a process of its own."""
  model = folder / "model" / "bagel"
  if not model.exists():
    shutil.rmtree(model.parent, ignore_errors=True)
    model.parent.mkdir(parents=True)
    process = server.Process(target=shallow.make, args=(model.parent,))
    process.start()
    process.join()
  return model


class Torture:
  """Counts, and the rounds under way, in a folder."""

  def __init__(self, folder: pathlib.Path, what: str, number: signal.Signals, seed: int):
    self._folder, self._signal, self._server = folder, number, small.server(folder / "compiled")
    folder.mkdir(parents=True, exist_ok=True)
    self._what, self._file = what, folder / f"{what}-{number.name}.json"
    self.counts = json.loads(self._file.read_text()) if self._file.exists() else {
      "kills": {}, "rounds": 0, "different": [], "failed": [], "litter": [], "seconds": [],
    }
    self._rng = random.Random(f"{seed} {self.total} {number}")

  @property
  def total(self) -> int:
    return sum(self.counts["kills"].values())

  def keep(self) -> None:
    self._file.write_text(json.dumps(self.counts, indent=1))

  def start(self, job: small.Job) -> small.Process:
    return small.Process(job, self._folder / "log.txt", self._server)

  def prepare(self) -> pathlib.Path | None:
    """The model, and the round that nothing kills, whose times are measured."""
    model = None if self._what == "toy" else make_model(self._folder, self._server)
    times, whole = (self._folder / f"{self._what}{name}" for name in ("-times.json", "-whole"))
    if not times.exists():
      shutil.rmtree(whole, ignore_errors=True)
      measured = {}
      for name, job in Round(whole, model).jobs().items():
        process = self.start(job)
        if status := process.end():
          raise SystemExit(f"{name} ended with status {status}; see {self._folder / 'log.txt'}")
        measured[name] = process.seen
      times.write_text(json.dumps(measured))
    self._times = json.loads(times.read_text())
    self._whole = Round(whole, model).result()
    return model

  def round(self, model: pathlib.Path | None, kills: int, deadline: float) -> None:
    """A round to its end, killed until there are so many `kills`."""
    place = self._folder / f"{self._what}-{self._signal.name}"
    attempt, jobs = Round(place, model), Round(place, model).jobs()
    for name, job in jobs.items():
      for number in range(ATTEMPTS[name] + 1):
        if time.monotonic() > deadline:
          raise TimeoutError
        may_kill = number < ATTEMPTS[name] and self.total < kills
        if self._attempt(name, job, may_kill):
          break
    self.counts["rounds"] += 1
    got = attempt.result()
    self.counts["different"] += [
      key for key in sorted(got.keys() | self._whole.keys()) if got.get(key) != self._whole.get(key)
    ]
    self.counts["litter"] += attempt.litter()
    self.keep()
    if self.counts["different"]:
      raise SystemExit(f"round {self.counts['rounds']} differs: {self.counts['different'][:9]}")
    shutil.rmtree(place)

  def _attempt(self, name: str, job: small.Job, may_kill: bool) -> bool:
    """Runs a job once, and may end it on the way; whether it came to its end."""
    process = self.start(job)
    killed = may_kill and self._kill(name, process)
    signalled = time.monotonic()
    status = process.end()
    if not killed:
      if status:
        self._fail(f"{name}: status {status} though nothing ended it")
      return not status
    place = f"{name}: {killed}"
    self.counts["kills"][place] = self.counts["kills"].get(place, 0) + 1
    if self._signal != signal.SIGKILL:
      seconds = time.monotonic() - signalled
      self.counts["seconds"].append(round(seconds, 2))
      expected = (0,) if name in ("train", "toy") else (0, 130, -self._signal)
      if status not in expected or seconds > SECONDS:
        self._fail(f"{place}: status {status} after {seconds:.1f} s")
    print(f"{self.total} {place} (status {status})", flush=True)
    self.keep()
    return False

  def _fail(self, text: str) -> None:
    self.counts["failed"].append(text)
    self.keep()
    print(f"FAILED {text}", flush=True)
    if len(self.counts["failed"]) > 20:
      raise SystemExit("too many failures")

  def _kill(self, name: str, process: small.Process) -> str:
    """Ends a process at a random moment; where, or "" if it came to its end before."""
    moments, seen = MOMENTS[name], self._times[name]
    where = self._rng.choices(list(moments), list(moments.values()))[0]
    if where in ("start", "end"):
      first = next((at for phase, at in seen if phase), 2.0)
      time.sleep(self._rng.uniform(0, first))
    else:
      # Of a conversion any piece, else one of the first two, so that each start gets further.
      most = sum(phase == where for phase, _ in seen)
      count = self._rng.randint(1, most if where == "conversion" else min(most, 2))
      if not process.wait_for(where, count):
        return ""
      time.sleep(self._rng.uniform(0, 1.2 * self._duration(seen, where)))
    return where if process.send(self._signal) else ""

  def _duration(self, seen, where: str) -> float:
    """The usual seconds from the entry of a phase to that of the next one."""
    gaps = [
      later - at for (phase, at), (_, later) in zip(seen, seen[1:] + [["", seen[-1][1] + 1.0]])
      if phase == where
    ]
    return statistics.median(gaps)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--what", choices=("small", "toy"), default="small")
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
  parser.add_argument("--minutes", type=float, default=1e9, help="to stop after, for now")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  number = signal.Signals[f"SIG{args.signal}"]
  torture = Torture(args.folder.absolute(), args.what, number, args.seed)
  deadline = time.monotonic() + 60 * args.minutes
  model = torture.prepare()
  try:
    while torture.total < args.kills:
      torture.round(model, args.kills, deadline)
  except TimeoutError:
    print("out of time; the same command continues")
  print_table(torture)
  return bool(torture.counts["failed"] or torture.counts["different"])


def print_table(torture: Torture) -> None:
  """The counts in Markdown."""
  counts = torture.counts
  print(f"| {torture._signal.name} within | times |\n| --- | --- |")
  for place, number in sorted(counts["kills"].items()):
    print(f"| {place} | {number} |")
  print(f"| in all | {torture.total} |")
  litter = collections.Counter(pathlib.PurePath(name).name for name in counts["litter"])
  print(f"\nrounds {counts['rounds']}, files that differ {len(counts['different'])}, "
        f"other failures {len(counts['failed'])}, left behind {sum(litter.values())}")
  if counts["seconds"]:
    print(f"seconds to the end: median {statistics.median(counts['seconds'])}, "
          f"largest {max(counts['seconds'])}")


if __name__ == "__main__":
  sys.exit(main())
