"""What the pages say: README.md and docs/*.md as blocks, commands and inline code."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
# In the order of the site, so that what one page makes another can use.
PAGES = [ROOT / "README.md", *(
  ROOT / "docs" / name for name in re.findall(r"\w+\.md", (ROOT / "mkdocs.yml").read_text())
)]


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a page."""

  page: str
  line: int  # of its first line
  language: str
  text: str

  @property
  def commands(self) -> list[str]:
    """Its lines, without comments; those that a backslash continues are one."""
    lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def blocks(language: str) -> list[Block]:
  """All blocks of a language: "bash", "python"; "" of none."""
  found = []
  for path in PAGES:
    text = path.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
      if match[1] == language:
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(path.name, line, language, match[2]))
  return found


def cells() -> list[Block]:
  """The code of the notebook, as blocks of "bash" where a cell begins so, else of "python"; `line`
  is the cell's number.
  """
  found = []
  for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
    text = "".join(cell["source"])
    if cell["cell_type"] == "code":
      language = "bash" if text.startswith("%%bash\n") else "python"
      found.append(Block(NOTEBOOK.name, number, language, text))
  return found


def inline(path: pathlib.Path) -> list[str]:
  """The code within the sentences of a page, each in one line."""
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
  return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
