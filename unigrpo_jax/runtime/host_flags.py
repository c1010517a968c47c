"""The flags that connect several hosts by hand; apart from `hosts`, which takes long to import."""

from __future__ import annotations

# (name, type, help): the arguments of `hosts.start`.
FLAGS = (
  ("coordinator", str, "several hosts: HOST:PORT of the first; TPU pods, GKE and SLURM jobs need "
   "none of these three"),
  ("processes", int, "several hosts: how many processes there are"),
  ("process", int, "several hosts: which of them this is, from 0"),
)


def add_arguments(parser) -> None:
  """Adds them to an `argparse` parser."""
  for name, kind, words in FLAGS:
    parser.add_argument(f"--{name}", type=kind, help=words)
