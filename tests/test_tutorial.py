"""The notebook docs/tutorial.ipynb: stored without outputs, and runs from top to bottom."""

import json
import os
import pathlib
import sys

import pytest

from tests import pages


def test_it_is_stored_without_outputs():
  """A diff shows what was written, not what a machine drew."""
  notebook = json.loads(pages.NOTEBOOK.read_text())
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert len(code) >= 8
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_uses_public_names_alone():
  """Commands and a reward: no module of the package is imported."""
  for cell in pages.cells():
    if cell.language == "python":
      assert "from unigrpo_jax" not in cell.text and "import unigrpo_jax" not in cell.text


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
  """All cells, in a new folder; EXECUTED names a file to keep the result in, to look at."""
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pages.ROOT), *sys.path]))
  monkeypatch.delenv("XLA_FLAGS")  # eight devices are for tests within this process
  notebook = nbformat.read(pages.NOTEBOOK, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=3000, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  )
  try:
    client.execute()
  finally:
    nbformat.write(notebook, os.environ.get("EXECUTED", tmp_path / "executed.ipynb"))
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
  for run in ("run", "night"):
    rows = pathlib.Path(tmp_path, run, "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 10
