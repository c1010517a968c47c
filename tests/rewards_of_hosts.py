"""A reward for runs on several hosts: how bright a picture is. It notes what it is asked to score,
and can end its host in the middle of a step."""

import json
import os
import pathlib
import signal

import jax
import numpy as np

SEEN, END = "REWARDS_SEEN", "REWARDS_END"  # a folder; "host:call:signal"


def brightness(samples):
  scores = [float(sample.image.mean()) / 255 for sample in samples]
  seen = pathlib.Path(os.environ[SEEN]) / f"{jax.process_index()}.jsonl"
  with seen.open("a") as file:
    rows = [[sample.prompt, sample.text, score] for sample, score in zip(samples, scores)]
    file.write(json.dumps(rows) + "\n")
  host, call, number = (int(part) for part in os.environ.get(END, "-1:0:0").split(":"))
  if host == jax.process_index() and len(seen.read_text().splitlines()) == call:
    os.kill(os.getpid(), signal.Signals(number))
  return np.array(scores)
