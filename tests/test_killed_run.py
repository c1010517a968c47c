"""Runs that are killed or stopped at random moments continue as if nothing had happened.

Some of what `tests.torture` does; minutes.
"""

import pytest

from tests.torture import growth, kills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the programs stay compiled from one test to the next."""
  return tmp_path_factory.mktemp("torture")


@pytest.mark.slow
@pytest.mark.parametrize("what, signal, count", [
  ("toy", "KILL", 10), ("toy", "TERM", 5), ("small", "KILL", 5), ("small", "TERM", 3),
])
def test_what_is_ended_at_random_moments_comes_to_the_same_end(folder, what, signal, count):
  arguments = [f"--folder={folder}", f"--what={what}", f"--signal={signal}", f"--kills={count}"]
  assert kills.main(arguments) == 0


@pytest.mark.slow
def test_a_run_does_not_grow(folder):
  assert growth.main([f"--folder={folder}", "--steps=60"]) == 0


def test_growth_is_seen():
  flat = [{"memory": 500.0, "threads": 40, "files": 30}] * 100
  grown = [row | {"files": 30 + number // 20} for number, row in enumerate(flat)]
  assert growth.table(flat)[1] and not growth.table(grown)[1]
