"""Prompts as other projects keep them: tables, lists, parquet files, folders of splits."""

import datetime
import json
import sys
import types
import uuid

import pytest

from tests import refusals
from unigrpo_jax.data import __main__ as command
from unigrpo_jax.data import prompts, records


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def read(path, **options):
  return list(prompts.read_file(path, **options))


# Tables.


def test_a_csv_row_is_a_prompt_and_its_columns_are_metadata(tmp_path):
  path = write(tmp_path / "a.csv", (
    '\ufeffid,Category,caption,note,\r\n1,Animals,"a ""red"" fox, asleep",,x\r\n\r\n'
    '2,,"two\nlines",n,\r\n'))
  assert read(path) == [
    ('a "red" fox, asleep', {
      "prompt": 'a "red" fox, asleep', "id": "1", "Category": "Animals", "tag": "Animals"}),
    ("two\nlines", {"prompt": "two\nlines", "id": "2", "note": "n"}),
  ]


def test_quotes_in_a_tsv_are_kept_as_in_partiprompts(tmp_path):
  path = write(tmp_path / "PartiPrompts.tsv", (
    "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"
    '"Fly" is on the wall\tArts\tBasic\t"\n"the word ""KEEP"""\tArts\tBasic\t\n'))
  assert [prompt for prompt, _ in read(path)] == ["bond", '"Fly" is on the wall', 'the word "KEEP"']
  assert read(path)[0][1] == {
    "prompt": "bond", "Category": "Abstract", "Challenge": "Basic", "tag": "Abstract"}


def test_columns_of_json_are_metadata_as_in_geneval(tmp_path):
  include = [{"class": "cup", "count": 2}]
  quoted = lambda value: '"' + json.dumps(value).replace('"', '""') + '"'
  path = write(tmp_path / "a.csv", (
    "prompt,include,metadata\n"
    f"two cups,{quoted(include)},\none cup,,{quoted({'tag': 'one', 'n': [1]})}\n"))
  assert read(path) == [
    ("two cups", {"prompt": "two cups", "include": include}),
    ("one cup", {"prompt": "one cup", "tag": "one", "n": [1]}),
  ]
  write(path, "prompt,include\na,[1]\n")
  assert "include[0]=1 must be an object" in refusals.refusal(read, path)
  write(path, "prompt,metadata\na,[1]\n")
  assert "line 2: [1] is not an object" in refusals.refusal(read, path)


@pytest.mark.parametrize("content, words", [
  ("Prompt,a,a\nx,1,2\n", "line 1: the column 'a' is there twice"),
  ("prompt,a\nx\n", "line 2: 1 cells, and the first line names 2 columns"),
  ('prompt,a\nx,1\n"x,1\n', "line 3: not a table"),
  ("Prompt;a\nx;1\n", 'line 2: no key "prompt" (its keys: Prompt;a)'),
  ("prompt,a\n,1\n", "line 2: the prompt is empty; write it, or delete the line"),
  ("prompt,text\na,A\n,B\n", "line 3: the prompt is empty"),  # B is not the prompt
  ("text,caption\nA,a\nB,\n", "line 3: the caption is empty"),
  ("prompt,a\n", "no prompts in it; expected at least one"),
  (b"prompt\ncaf\xe9\n", "byte 11 is not UTF-8"),
])
def test_a_bad_table_is_named(content, words, tmp_path):
  path = write(tmp_path / "a.csv", content)
  message = refusals.refusal(read, path)
  assert message.startswith(str(path)) and words in message


def test_a_json_list(tmp_path):
  path = write(tmp_path / "a.json", json.dumps([
    {"Prompt": "a clock", "Category": "Time", "prompt_id": 401}, {"prompt_en": "a cup"}]))
  assert read(path) == [
    ("a clock", {"prompt": "a clock", "Category": "Time", "prompt_id": 401, "tag": "Time"}),
    ("a cup", {}),
  ]
  for content, words in (
    ('{"prompt": "a"}', "is not a list; expected a list of objects"),
    ('{"prompt": "a"}\n{"prompt": "b"}', "one object a line is a .jsonl file"),
    ('[{"prompt": "a"}, 3]', "item 2: 3 is not an object"),
    ('[{"prompt": "a"}, {"prompt": NaN}]', "not JSON"),
    ("[]", "no prompts in it"),
  ):
    message = refusals.refusal(read, write(path, content))
    assert message.startswith(str(path)) and words in message


@pytest.mark.parametrize("record, prompt_key, expected", [
  ({"text": "t", "caption": "c"}, None, "c"), ({"text": "t", "caption": "c"}, "text", "t"),
  ({"prompt": "p", "Prompt": "P"}, None, "p"), ({"prompt": "p", "l": "l", "n": 1}, "l", "l"),
])
def test_the_key_of_the_prompt(record, prompt_key, expected, tmp_path):
  path = write(tmp_path / "a.jsonl", json.dumps(record))
  [(prompt, metadata)] = read(path, prompt_key=prompt_key)
  assert prompt == metadata["prompt"] == expected
  message = refusals.refusal(read, path, prompt_key="other")
  assert 'no key "other"' in message and "--prompt_key" in message


# Rows of verl.


VERL = {
  "data_source": "ocr", "ability": "t2i", "extra_info": {"split": "test", "index": 0},
  "prompt": [{"role": "system", "content": "Draw."}, {"role": "user", "content": "a \"HI\" sign"}],
  "reward_model": {"style": "rule", "ground_truth": "HI"},
}


def test_a_row_of_verl(tmp_path):
  path = write(tmp_path / "a.jsonl", json.dumps(VERL))
  [(prompt, metadata)] = read(path)
  assert prompt == 'a "HI" sign' and metadata == VERL | {"prompt": prompt, "text": "HI"}
  parts = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "cup"}]
  truth = {"reward_model": {"ground_truth": {"n": 1}}}
  row = VERL | truth | {"prompt": [{"role": "user", "content": parts}]}
  [(prompt, metadata)] = read(write(path, json.dumps(row)))
  assert prompt == "a cup" and "text" not in metadata
  for wrong in ([], [{"role": "system", "content": "a"}], [1], [{"role": "user"}]):
    write(path, json.dumps({"prompt": wrong}))
    assert "neither text nor a list of messages" in refusals.refusal(read, path)


# Parquet. A stand-in for pyarrow has as much of it as is called, so that this runs everywhere.


class Type:
  def __init__(self, name, *fields):
    self.name, self.fields, self.num_fields = name, fields, len(fields)

  def field(self, i):
    return types.SimpleNamespace(type=self.fields[i])


@pytest.fixture
def pyarrow(monkeypatch):
  is_a = lambda name: lambda kind: kind.name == name
  kinds = ("dictionary", "binary", "large_binary", "fixed_size_binary")
  module = types.ModuleType("pyarrow")
  module.ArrowException = type("ArrowException", (Exception,), {})
  module.types = types.SimpleNamespace(**{f"is_{kind}": is_a(kind) for kind in kinds})
  module.parquet = types.ModuleType("pyarrow.parquet")

  class ParquetFile:
    """Of a JSON file: {"types": {column: type, or [type, types of fields]}, "rows": [...]}."""

    def __init__(self, path):
      content = path.read_text()
      if not content.startswith("{"):
        raise module.ArrowException("magic bytes\nnot found")
      self.content = json.loads(content)
      made = {name: Type(kind) if isinstance(kind, str) else Type(kind[0], *map(Type, kind[1]))
              for name, kind in self.content["types"].items()}
      self.schema_arrow = [types.SimpleNamespace(name=n, type=t) for n, t in made.items()]

    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None

    def iter_batches(self, columns):
      for row in self.content["rows"]:
        chosen = {name: row.get(name) for name in columns}
        yield types.SimpleNamespace(to_pylist=lambda chosen=chosen: [chosen])

  module.parquet.ParquetFile = ParquetFile
  monkeypatch.setitem(sys.modules, "pyarrow", module)
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", module.parquet)


def stand_in(path, rows, **kinds):
  names = dict.fromkeys(key for row in rows for key in row)
  made = {name: kinds.get(name, "string") for name in names}
  return write(path, json.dumps({"types": made, "rows": rows}))


def test_parquet_rows_without_bytes_and_nulls(pyarrow, tmp_path):
  path = stand_in(
    tmp_path / "a.parquet",
    [VERL | {"jpg": "..", "image": {"bytes": ".."}},
     {"prompt": [{"role": "user", "content": "b"}], "extra_info": {"index": 3, "split": None}}],
    jpg="binary", image=["struct", ["binary", "string"]],
  )
  (first, metadata), (second, other) = read(path)
  assert (first, second) == ('a "HI" sign', "b")
  assert metadata == VERL | {"prompt": first, "text": "HI"}
  assert other == {"prompt": "b", "extra_info": {"index": 3}}
  write(path, b"PAR1")
  message = refusals.refusal(read, path)
  assert message == (
    f"{path}: not a readable parquet file (magic bytes); an incomplete download?")


def test_a_null_prompt_of_parquet_is_none_of_the_other_columns(pyarrow, tmp_path):
  rows = [{"prompt": "a", "text": "x"}, {"prompt": None, "text": "y"}]
  path = stand_in(tmp_path / "a.parquet", rows)
  assert f"{path}, row 2: the prompt is empty" in refusals.refusal(read, path)


def test_without_pyarrow_its_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  message = refusals.refusal(read, write(tmp_path / "a.parquet", b"PAR1"))
  assert "need pyarrow; pip install 'unigrpo_jax[parquet]'" in message


def test_what_parquet_has_is_made_json():
  plain = records._plain({
    "day": datetime.date(2026, 1, 2), "none": None, "nan": float("nan"), "n": 1, "pair": (1, None),
    "in": {"x": None, "y": [{"z": None}]}, "id": uuid.UUID(int=7), "yes": True})
  assert plain == {
    "day": "2026-01-02", "n": 1, "pair": [1, None], "in": {"y": [{}]},
    "id": "00000000-0000-0000-0000-000000000007", "yes": True}


def test_real_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow", reason="pip install 'unigrpo_jax[parquet]'")
  from pyarrow import parquet

  rows = [VERL | {"image": {"bytes": b"x", "path": None}, "day": datetime.date(2026, 1, 2)},
          {"prompt": [{"role": "user", "content": "b"}], "day": None}]
  path = tmp_path / "data" / "train-00000-of-00002.parquet"
  path.parent.mkdir()
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  include = [
    {"class": "cup", "count": 1, "color": None}, {"class": "fox", "count": 2, "color": "red"}]
  table = pyarrow.Table.from_pylist([{"caption": "c", "include": include, "raw": b"x"}])
  parquet.write_table(table, tmp_path / "data" / "train-00001-of-00002.parquet")
  opened = list(prompts.open_set(tmp_path, "train"))
  assert [p.prompt for p in opened] == ['a "HI" sign', "b", "c"]
  assert opened[0].metadata == VERL | {"prompt": 'a "HI" sign', "text": "HI", "day": "2026-01-02"}
  assert opened[2].metadata == {
    "prompt": "c", "include": [{"class": "cup", "count": 1}, include[1]]}
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  assert "not a readable parquet file" in refusals.refusal(prompts.open_set, tmp_path, "train")


# Folders.


def test_a_folder_has_a_file_a_split(tmp_path, pyarrow):
  flow_grpo = tmp_path / "ocr"
  write(flow_grpo / "train.txt", "a\nb\n")
  write(flow_grpo / "test.txt", "c\n")
  write(flow_grpo / "License.txt", "MIT License\n\nCopyright (c) 2025\n")
  write(tmp_path / "geneval" / "train_metadata.jsonl", '{"prompt": "a", "tag": "t"}')
  write(tmp_path / "geneval" / "test_metadata.jsonl", '{"prompt": "c", "tag": "t"}')
  hub = tmp_path / "hub"
  for i in range(11):
    stand_in(hub / "data" / f"train-{i:05}-of-00011-abcdef0123.parquet", [{"prompt": f"a {i}"}])
  stand_in(hub / "data" / "test-00000-of-00001.parquet", [{"prompt": "c"}])
  stand_in(tmp_path / "plain" / "test.parquet", [{"prompt": "c"}])
  for i in (2, 1, 10):
    stand_in(tmp_path / "numbered" / f"train-{i}.parquet", [{"prompt": f"a {i}"}])
  assert [p.prompt for p in prompts.open_set(flow_grpo, "train")] == ["a", "b"]
  assert [p.prompt for p in prompts.open_set(hub, "train")] == [f"a {i}" for i in range(11)]
  numbered = prompts.open_set(tmp_path / "numbered", "train")
  assert [p.prompt for p in numbered] == ["a 1", "a 2", "a 10"]
  for folder in ("ocr", "geneval", "hub", "plain"):
    assert [p.prompt for p in prompts.open_set(str(tmp_path / folder), "test")] == ["c"]


@pytest.mark.parametrize("names, words", [
  (("test.txt", "test_metadata.jsonl"), "test.txt and test_metadata.jsonl are both the split"),
  (("test.parquet", "data/test-0.parquet"), "test.parquet and data/test-0.parquet are both"),
  (("test.parquet", "test_hard.parquet"), "test.parquet and test_hard.parquet are both"),
  (("test-00000-of-00002.parquet",), "is of 2 files, of which 1 are there; download the rest"),
  (("test-00000-of-00001-0a.parquet", "test-00000-of-00001-0b.parquet"),
   "is of 1 files, of which 2 are there; remove those of another version"),
  (("train.txt", "License.txt", "testing.txt", "mytest.txt"),
   "no file of the split 'test', such as test.txt"),
])
def test_one_file_is_that_of_the_split(names, words, tmp_path):
  for name in names:
    write(tmp_path / name, "x\n")
  message = refusals.refusal(prompts.open_set, tmp_path, "test")
  assert message.startswith(str(tmp_path)) and words in message


# Stubs and licences.


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_stubs_of_large_files_are_told_from_files(name, tmp_path):
  path = write(tmp_path / name, (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"))
  message = refusals.refusal(read, path)
  assert message.startswith(f"{path}: a Git LFS pointer") and "git lfs pull" in message
  message = refusals.refusal(read, write(path, ""))
  assert message.startswith(f"{path}: no prompts in it")
  assert message.endswith("; a Git LFS pointer or an incomplete download?")
  assert "LFS" not in refusals.refusal(read, write(tmp_path / "b.txt", " \n"))


@pytest.mark.parametrize("line, noted", [
  ("MIT License", True), ("Copyright (c) 2024 Someone", True), ("The MIT License (MIT)", True),
  ("Apache License, Version 2.0", True), ("a driving license on a table", False),
  ("a copyright sign on a wall", False),
])
def test_a_licence_among_prompts_is_noted_once(line, noted, tmp_path, capsys):
  path = write(tmp_path / "a.txt", f"a kite\n\n{line}\n{line}\n")
  assert len(read(path)) == 3
  said = capsys.readouterr().err
  assert said.count("\n") == noted and (f"{path}, line 3: " in said) == noted


# The command.


def test_the_command_builds_folders_and_names_the_prompts_key(tmp_path, capsys):
  write(tmp_path / "in" / "train.txt", "a\n")
  write(tmp_path / "in" / "test.csv", "long,prompt\nlong b,b\n")
  command.main([
    f"--build={tmp_path / 'in'}", "--split=train", f"--build={tmp_path / 'in' / 'test.csv'}",
    "--split=test", "--name=mine", f"--out={tmp_path}"])
  assert [p.prompt for p in prompts.open_set(tmp_path / "mine", "test")] == ["b"]
  command.main([
    f"--build={tmp_path / 'in'}", "--split=test", "--name=mine", f"--out={tmp_path}",
    "--prompt_key=long", "--overwrite"])
  [prompt] = prompts.open_set(tmp_path / "mine", "test")
  assert (prompt.prompt, prompt.metadata) == ("long b", {})
  assert "split test: 1 prompts" in capsys.readouterr().out
