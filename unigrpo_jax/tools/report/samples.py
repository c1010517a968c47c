"""The same prompts before and after: pictures, reasoning and rewards, and a table by category."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
import html
import io
import math
import pathlib

import PIL.Image

from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.tools.report import charts, workdir

# Prompts shown in all, and those of one mode at least.
SHOWN, SHOWN_OF_MODE = 24, 4
# Pixels of a side up to which a picture is embedded as it is; larger ones are scaled to `SIDE`.
SMALL, SIDE = 256, 384


def interval(scores: Sequence[float]) -> str:
  """Mean and 95 % interval as HTML; a dash where there is no score."""
  if not scores:
    return "–"
  mean, low, high = intervals.interval(scores)
  shown = f"{mean:.3f}"
  if len(scores) > 1:
    shown += f' <span class="ci">[{low:.3f}, {high:.3f}]</span>'
  return shown


def ends(run: workdir.Run) -> list[workdir.Evaluation]:
  """The first and the last evaluation; one or none where there are no more."""
  return [run.evaluations[0], run.evaluations[-1]] if len(run.evaluations) > 1 else run.evaluations


def by_category(run: workdir.Run) -> str:
  """The table of means by mode and category, before and after."""
  both = ends(run)
  if not both:
    return '<p class="missing">No evaluation was saved.</p>'
  names = list(dict.fromkeys(name for e in both for name in e.rewards))
  modes = list(dict.fromkeys(mode for e in both for mode in e.modes))
  head = "".join(
    f'<th class="number">{html.escape(name)}, iteration {e.iteration}</th>'
    for name in names for e in both
  )
  lines = []
  for mode in modes:
    categories = sorted({c for e in both for c in e.categories(mode)})
    for category in [*categories, None] if len(categories) > 1 else categories:
      count = max(
        sum(r.mode == mode and category in (None, r.category) for r in e.rows) for e in both
      )
      cells = "".join(
        f'<td class="number">{interval(e.scores(mode, name, category))}</td>'
        for name in names for e in both
      )
      label = html.escape("all" if category is None else category)
      lines.append(
        f'<tr class="{"all" if category is None else "one"}"><td>{html.escape(mode)}</td>'
        f'<td>{label}</td><td class="number">{count}</td>{cells}</tr>'
      )
  return (
    '<div class="scroll"><table><thead><tr><th>mode</th><th>category</th>'
    f'<th class="number">prompts</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    "</div>"
  )


def grid(run: workdir.Run) -> str:
  """Cards of the first prompts of each mode: what the first and the last evaluation drew."""
  both = ends(run)
  if not both:
    return '<p class="missing">No evaluation was saved.</p>'
  numbered = [_numbered(e) for e in both]
  modes = list(dict.fromkeys(mode for e in both for mode in e.modes))
  parts = []
  for mode in modes:
    keys = [
      key for key, row in numbered[0].items()
      if key[0] == mode and all(key in rows for rows in numbered) and _worth(
        [rows[key] for rows in numbered]
      )
    ]
    keys = keys[: max(SHOWN_OF_MODE, SHOWN // len(modes))]
    parts.append(f"<h3>{html.escape(mode)}</h3>")
    if not keys:
      parts.append('<p class="missing">No prompt of this mode has a kept picture or text.</p>')
      continue
    cards = "".join(
      _card([(e.iteration, rows[key]) for e, rows in zip(both, numbered)]) for key in keys
    )
    parts.append(f'<div class="cards">{cards}</div>')
  if len(both) == 1:
    parts.insert(0, '<p class="missing">There is one evaluation so far: nothing to compare.</p>')
  return "".join(parts)


def _numbered(evaluation: workdir.Evaluation) -> dict[tuple[str, str, int], workdir.Row]:
  """Rows by mode, prompt, and how often this prompt came before."""
  seen: Counter[tuple[str, str]] = Counter()
  rows = {}
  for row in evaluation.rows:
    rows[row.mode, row.prompt, seen[row.mode, row.prompt]] = row
    seen[row.mode, row.prompt] += 1
  return rows


def _worth(rows: Sequence[workdir.Row]) -> bool:
  return any(row.image is not None for row in rows)


def _card(sides: Sequence[tuple[int, workdir.Row]]) -> str:
  """One prompt: a side for each (iteration, row)."""
  prompt = html.escape(sides[0][1].prompt)
  shown = "".join(_side(iteration, row) for iteration, row in sides)
  return f'<div class="card"><h4>{prompt}</h4><div class="pair">{shown}</div></div>'


def _side(iteration: int, row: workdir.Row) -> str:
  scores = ", ".join(
    f"{html.escape(name)} {charts.shown(value)}" for name, value in row.rewards.items()
    if math.isfinite(value)
  )
  text = f'<div class="thought">{html.escape(row.text)}</div>' if row.text else ""
  return (
    f'<div class="side"><div class="when">iteration {iteration}</div>{picture(row.image)}'
    f'<div class="score">{scores or "no reward"}</div>{text}</div>'
  )


def picture(path: pathlib.Path | None) -> str:
  """An <img> that holds the file; small ones exactly and in sharp pixels, large ones scaled."""
  if path is None:
    return '<p class="missing">no picture kept</p>'
  try:
    data = path.read_bytes()
    with PIL.Image.open(io.BytesIO(data)) as image:
      small = max(image.size) <= SMALL
      kind = image.format
      if not small or kind != "PNG":
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if small else "JPEG", quality=85)
        data, kind = buffer.getvalue(), "PNG" if small else "JPEG"
      else:
        image.load()
  except Exception:  # Pillow raises many kinds for damaged files; none may cost the page.
    return f'<p class="missing">{html.escape(path.name)} is missing or unreadable</p>'
  source = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
  return f'<img class="{"pixels" if small else "photo"}" alt="drawn picture" src="{source}">'
