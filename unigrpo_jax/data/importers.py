"""The questions of public benchmarks as exam points: JSON lines {"prompt", "tag", "points"}.

`exam_points` says what points are. Nothing of these sets comes with the package: each function
reads the file that its authors publish. Every prompt of a file is read, also the first row of
dpg_bench.csv, which DPG-Bench's own script leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import pathlib
import re
import sys
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import exam_points, lines, records

Record = dict[str, Any]


def dsg(path: pathlib.Path) -> Iterator[Record]:
  """DSG-1k (Cho et al., arXiv 2310.18235): dsg-1k-anns.csv, a row a question."""
  by_item: dict[str, tuple[str, dict[int, Record], dict[int, list[int]]]] = {}
  for where, row in records.read(path):
    _require(row, where, "item_id", "proposition_id", texts=("text", "question_natural_language"))
    prompt, points, parents = by_item.setdefault(str(row["item_id"]), (row["text"], {}, {}))
    number = _integer(row["proposition_id"], f"{where}: proposition_id")
    if row["text"] != prompt:
      raise errors.InputError(f"{where}: item_id={row['item_id']} has another text than before")
    if number in points:
      print(f"note: {where}: question {number} of item_id={row['item_id']} is there twice; this "
            "one counts", file=sys.stderr)
    points[number] = {"question": row["question_natural_language"]}
    if "category_broad" in row:
      points[number]["category"] = row["category_broad"]
    parents[number] = [
      _integer(n, f"{where}: dependency") for n in str(row.get("dependency", 0)).split(",")
    ]
  for item, (prompt, points, parents) in by_item.items():
    points = _ordered(points, parents, f"{path}, item_id={item}")
    yield {"prompt": prompt, **_tag(item), "item_id": item, "points": points}


def tifa(path: pathlib.Path) -> Iterator[Record]:
  """TIFA (Hu et al., arXiv 2303.11897): tifa_v1.0_question_answers.json, an item a question."""
  by_item: dict[str, Record] = {}
  for where, row in records.read(path):
    _require(row, where, "id", "answer", texts=("caption", "question"))
    question, choices = row["question"], row.get("choices", [])
    if not isinstance(choices, list):
      raise errors.InputError(f"{where}: choices={errors.shown(choices)} must be a list")
    if {str(choice).lower() for choice in choices} - {"yes", "no"}:
      question += f" Choices: {', '.join(map(str, choices))}"
    point = {"question": question, "answer": row["answer"]}
    if "element_type" in row:
      point["category"] = row["element_type"]
    item = str(row["id"])
    record = {"prompt": row["caption"], **_tag(item), "item_id": item, "points": []}
    with errors.at(where):
      exam_points.read({"points": [point]})
    by_item.setdefault(item, record)["points"].append(point)
  yield from by_item.values()


_ONEIG_FILES = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object"}


def oneig(path: pathlib.Path) -> Iterator[Record]:
  """OneIG-Bench (arXiv 2506.07977): OneIG-Bench.csv (or .json), and its questions.

  They are Q_D/{anime,human,object}.json beside it, or in scripts/alignment/, as in the repository.
  Prompts of other categories, text and knowledge, have no questions and are left out.
  """
  folders = [path.parent / "Q_D", path.parent / "scripts" / "alignment" / "Q_D"]
  folder = next((folder for folder in folders if folder.is_dir()), None)
  if folder is None and path.exists():  # Else it is the file that is not there.
    raise errors.InputError(
      f"{path}: no folder Q_D with the questions beside it; copy scripts/alignment/Q_D of the "
      "repository there"
    )
  asked: dict[str, Mapping[str, Any]] = {}
  for where, row in records.read(path):
    _require(row, where, "id", texts=("category", "prompt_en"))
    name = _ONEIG_FILES.get(row["category"])
    if name is None:
      continue
    source = folder / f"{name}.json"
    if name not in asked:
      asked[name] = _json_object(source)
    entry = asked[name].get(str(row["id"]).zfill(3))
    if entry is None:
      raise errors.InputError(f"{source}: no questions of id {row['id']}, which {where} has")
    place = f"{source}, id {row['id']}"
    with errors.at(place):
      questions, parents = (_numbered(entry, key) for key in ("question", "dependency"))
      for number, wanted in parents.items():
        if not isinstance(wanted, list):
          raise errors.InputError(f"dependency={errors.shown(wanted)} must be a list of numbers")
        parents[number] = [_integer(parent, "dependency") for parent in wanted]
    points = {number: {"question": question} for number, question in questions.items()}
    points = _ordered(points, parents, place)
    with errors.at(place):
      exam_points.read({"points": points})
    yield {
      "prompt": row["prompt_en"], "tag": row["category"], "item_id": str(row["id"]),
      "points": points,
    }


def geneval2(path: pathlib.Path) -> Iterator[Record]:
  """GenEval 2 (facebookresearch/GenEval2): its .jsonl file's `vqa_list`, with each one's skill.

  The tag is the number of atoms, by which soft-TIFA's geometric mean is reported.
  """
  for where, row in records.read(path):
    _require(row, where, texts=("prompt",))
    skills = row.get("skills", [])
    with errors.at(where):
      points = [
        {"question": point.question, "answer": point.answer} for point in exam_points.read(row)
      ]
    if not points:
      raise errors.InputError(f"{where}: no vqa_list; give GenEval 2's own file")
    if isinstance(skills, list) and len(skills) == len(points):
      points = [point | {"category": skill} for point, skill in zip(points, skills)]
    kept = {k: v for k, v in row.items() if k not in ("vqa_list", "skills")}
    atoms = row.get("atom_count", len(points))
    yield kept | {"tag": f"{atoms} atoms", "points": points}


# The last prompt_id of each of the groups that WISE reports.
_WISE = {400: "culture", 520: "time", 640: "space", 760: "biology", 880: "physics",
         1000: "chemistry"}


def wise(path: pathlib.Path) -> Iterator[Record]:
  """WISE (Niu et al., arXiv 2503.07265): its .json files. They have an Explanation, no questions.

  The judge's forms `wise_verified` and `wise_legacy` score them by a template of the user's.
  """
  for where, row in records.read(path):
    _require(row, where, "prompt_id", texts=("Prompt",))
    number = _integer(row["prompt_id"], f"{where}: prompt_id")
    tag = next((name for last, name in _WISE.items() if 1 <= number <= last), None)
    if tag is None:
      raise errors.InputError(f"{where}: prompt_id={number} must be from 1 to 1000")
    rest = {key: value for key, value in row.items() if key != "Prompt"}
    yield {"prompt": row["Prompt"], "tag": tag} | rest


SETS: dict[str, Callable[[pathlib.Path], Iterable[Record]]] = {
  "dpg": dsg,  # DPG-Bench (ELLA, arXiv 2403.05135), dpg_bench.csv, has DSG's columns.
  "dsg": dsg, "tifa": tifa, "oneig": oneig, "geneval2": geneval2, "wise": wise,
}


def _ordered(
  points: Mapping[int, Record], parents: Mapping[int, list[int]], where: str
) -> list[Record]:
  """Points by their numbers, each after those that it needs, with `needs` as places in the list.

  A parent of 0 is none; one that is not there, or is the point itself, is left out with a note.

  Raises:
    InputError: points need each other.
  """
  needs: dict[int, list[int]] = {}
  for number in points:
    wanted = [parent for parent in parents.get(number, ()) if parent]
    needs[number] = [parent for parent in wanted if parent in points and parent != number]
    if len(needs[number]) < len(wanted):
      print(f"note: {where}: question {number} depends on {wanted}, of which there are "
            f"{needs[number]}", file=sys.stderr)
  places: dict[int, int] = {}
  while len(places) < len(points):
    ready = next(
      (n for n in sorted(points) if n not in places and all(p in places for p in needs[n])), None
    )
    if ready is None:
      rest = ", ".join(str(n) for n in sorted(points) if n not in places)
      raise errors.InputError(f"{where}: questions {rest} depend on each other")
    places[ready] = len(places) + 1
  return [
    points[n] | ({"needs": sorted({places[p] for p in needs[n]})} if needs[n] else {})
    for n in places
  ]


def _tag(item: str) -> dict[str, str]:
  """The source of a prompt, as its id begins: coco_301091 is of coco."""
  source = re.sub(r"[_-]?\d+$", "", item)
  return {"tag": source} if source else {}


def _require(row: Record, where: str, *keys: str, texts: Sequence[str] = ()) -> None:
  """Raises InputError unless a row has all of these keys, and text under those of `texts`."""
  for key in (*keys, *texts):
    if row.get(key) in (None, ""):
      names = ", ".join(map(str, row))[:100]
      raise errors.InputError(f"{where}: no {key} (it has {names}); give the set's own file")
  for key in texts:
    lines.check_text(row, key, where)


def _integer(value: Any, name: str) -> int:
  try:
    return int(str(value).strip())
  except ValueError:
    raise errors.InputError(f"{name}={errors.shown(value)} must be an integer") from None


def _json_object(path: pathlib.Path) -> Mapping[str, Any]:
  if not path.is_file():
    raise errors.InputError(f"{path}: no such file; it has the questions of a category")
  return lines.parse(records.decoded(path), str(path), "expected an object of questions by id")


def _numbered(entry: Any, key: str) -> dict[int, Any]:
  """{number: value} of a key whose value is such an object, or that as text of JSON."""
  value = entry.get(key) if isinstance(entry, dict) else None
  if isinstance(value, str):
    value = lines.parse(value, key, "expected an object by numbers")
  if not isinstance(value, dict):
    raise errors.InputError(f"{key}={errors.shown(value)} must be an object by numbers")
  return {_integer(number, key): item for number, item in value.items()}
