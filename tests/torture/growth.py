"""Measures what a run of many iterations holds: memory, threads and open files at each.

  python -m tests.torture.growth --folder=FOLDER --steps=300

After the tenth iteration nothing may grow. The rows are in FOLDER/growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys

from tests.torture import kills, small

FIRST = 10
MEMORY_MB = 20  # What the allocator and the page cache of a run may differ by.


def measure(folder: pathlib.Path, steps: int) -> list[dict[str, float]]:
  """A row an iteration: memory in MB, threads, open files."""
  folder.mkdir(parents=True, exist_ok=True)
  shutil.rmtree(folder / "growth", ignore_errors=True)
  server = small.server(folder / "compiled")
  job = small.training(
    folder / "growth", kills.make_model(folder, server), "", steps, checkpoint_every=10,
    **{"eval.every": 50},
  )
  process, rows = small.Process(job, folder / "log.txt", server), []
  for step in range(1, steps + 1):
    if not process.wait_for("step", step):
      raise SystemExit(f"it ended at step {step}; see {folder / 'log.txt'}")
    rows.append(_held_by(process.pid))
    (folder / "growth.json").write_text(json.dumps(rows))
  if status := process.end():
    raise SystemExit(f"it ended with status {status}; see {folder / 'log.txt'}")
  return rows


def _held_by(pid: int) -> dict[str, float]:
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  status = dict(line.split(":", 1) for line in lines)
  return {
    "memory": int(status["VmRSS"].split()[0]) / 1024, "threads": int(status["Threads"]),
    "files": len(os.listdir(f"/proc/{pid}/fd")),
  }


def table(rows: list[dict[str, float]]) -> tuple[str, bool]:
  """Markdown of the medians of tenths of the iterations after FIRST, and whether all is flat."""
  size = max((len(rows) - FIRST) // 10, 1)
  parts = [rows[start : start + size] for start in range(FIRST, len(rows) - size + 1, size)]
  lines = ["| iterations | memory, MB | threads | open files |", "| --- | --- | --- | --- |"]
  medians = []
  for number, part in enumerate(parts):
    first = FIRST + number * size + 1
    medians.append({key: statistics.median(row[key] for row in part) for key in part[0]})
    values = " | ".join(f"{value:.0f}" for value in medians[-1].values())
    lines.append(f"| {first} to {first + size - 1} | {values} |")
  limits = {"memory": MEMORY_MB, "threads": 1, "files": 1}
  flat = all(medians[-1][key] - medians[0][key] <= limit for key, limit in limits.items())
  return "\n".join(lines), flat


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=300)
  args = parser.parse_args(argv)
  text, flat = table(measure(args.folder.absolute(), args.steps))
  print(f"{text}\n\n{'flat' if flat else 'it grows'}")
  return not flat


if __name__ == "__main__":
  sys.exit(main())
