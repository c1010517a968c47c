"""Prompt files, prompt sets on disk, and the command that builds them."""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from tests import refusals
from unigrpo_jax import errors
from unigrpo_jax.data import __main__ as command
from unigrpo_jax.data import progress, prompt_folders, prompts
from unigrpo_jax.recipe import config_files, parts, rl

ROOT = pathlib.Path(__file__).parents[1]
# As in GenEval's evaluation_metadata.jsonl.
RECORDS = [
  {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "one kite"},
  {"tag": "counting", "include": [{"class": "cup", "count": 3}],
   "exclude": [{"class": "cup", "count": 4}], "prompt": "three caf\u00e9 cups"},
  {"tag": "position", "include": [
    {"class": "bird", "count": 1}, {"class": "apple", "count": 1, "position": ["left of", 0]},
  ], "prompt": "an apple left of a bird", "id": "a7", "note": {"by": None, "score": 0.5}},
]


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
  return path


def jsonl(path, records=RECORDS):
  return write(path, "".join(json.dumps(record) + "\n" for record in records))


def pairs(count, text="prompt"):
  return [(f"{text} {i}", {"n": i}) for i in range(count)]


def listing(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A set of 5 training and 3 test prompts, in a folder that is looked up by name."""
  out = tmp_path_factory.mktemp("sets")
  prompt_folders.build("both", {"train": pairs(5), "test": pairs(3, "caf\u00e9")}, out)
  return out / "both"


# Files.


def test_text_file(tmp_path):
  path = write(
    tmp_path / "a.TXT",
    b"\xef\xbb\xbffirst one\r\n\r\n  a kite \xe2\x80\xa8 torn  \n \t\n\xef\xbb\xbffirst one\n"
    b"last, no newline",
  )
  expected = ["first one", "a kite \u2028 torn", "first one", "last, no newline"]
  assert list(prompts.read_file(path)) == [(prompt, {}) for prompt in expected]


def test_the_whole_object_of_a_json_line_is_its_metadata(tmp_path):
  path = jsonl(tmp_path / "evaluation_metadata.jsonl")
  assert list(prompts.read_file(path)) == [(record["prompt"], record) for record in RECORDS]
  write(path, '\ufeff{"prompt": " a kite "}\r\n\n{"prompt": "\\u00e9"}')
  assert list(prompts.read_file(path)) == [(" a kite ", {}), ("\u00e9", {})]


@pytest.mark.parametrize("line, words", [
  ("{", "not JSON"),
  ("a red kite", "not JSON"),
  ("[" * 100_000, "not JSON"),
  ('{"prompt": "a", "score": NaN}', "NaN is not a finite number"),
  ('{"prompt": "a", "score": %s}' % ("1" * 5000), "not JSON"),
  ('"a red kite"', '"a red kite" is not an object; expected an object'),
  ('["a"]', '["a"] is not an object; expected an object'),
  ("null", "null is not an object; expected an object"),
  ('{"txt": "a", "tag": "b"}', 'no key "prompt" (its keys: txt, tag)'),
  ("{}", 'no key "prompt" (its keys: none)'),
  ('{"prompt": 3}', "prompt=3 must be text"),
  ('{"prompt": true}', "prompt=true must be text"),
  ('{"prompt": ["a"]}', "prompt=['a'] is neither text nor a list of messages"),
  ('{"prompt": null}', "prompt=null must be text"),
  ('{"prompt": " "}', "the prompt is empty"),
  ('{"prompt": "a\\ud83d"}', "holds '\\ud83d'"),
  ('{"prompt": "a", "tag": "\\udcff"}', "holds '\\udcff'"),
  ('{"prompt": "a", "score": 1e999}', "1e999 is not a finite number"),
  ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
  ('{"prompt": "a", "include": "kite"}', "include='kite' must be a list"),
  ('{"prompt": "a", "exclude": ["kite"]}', "exclude[0]='kite' must be an object"),
  ('{"prompt": "a", "include": [{"count": 1}]}', "include[0].class=None must be text"),
  ('{"prompt": "a", "include": [{"class": "kite"}]}', "include[0].count=None must be an integer"),
  ('{"prompt": "a", "include": [{"class": "kite", "count": "1"}]}', "include[0].count='1'"),
  ('{"prompt": "a", "include": [{"class": "kite", "count": 0}]}', "include[0].count=0"),
  ('{"prompt": "a", "include": [{"class": "kite", "count": 1, "color": 3}]}', "color=3"),
  ('{"prompt": "a", "include": [{"class": "kite", "count": 1, "position": ["above", 0]}]}',
   "include[0].position=['above', 0] must be [relation, an earlier entry's number]"),
  ('{"prompt": "a", "include": [{"class": "kite", "count": 1, "position": null}]}',
   "include[0].position=None"),
])
def test_bad_json_line_is_named(line, words, tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}\n')
  message = refusals.refusal(list, prompts.read_file(path))
  assert message.startswith(f"{path}, line 3: ") and words in message


@pytest.mark.parametrize("name, content, words", [
  ("a.txt", b"fine\ncaf\xe9\n", "line 2: byte 4 is not UTF-8"),
  ("a.txt", "fine".encode("utf-16"), "line 1: byte 1 is not UTF-8"),
  ("a.txt", "fine".encode("utf-16-le"), "line 1: holds the control character '\\x00'"),
  ("a.txt", b"one\rtwo\rthree", "line 1: holds the control character '\\r'"),
  ("a.jsonl", b'{"prompt": "caf\xe9"}', "line 1: byte 16 is not UTF-8"),
  ("a.txt", b"", "no prompts"),
  ("a.jsonl", b"\n \r\n", "no prompts"),
  ("a.xml", b"<prompt>", "'.xml' is not known; expected .txt, .jsonl, .json, .csv, .tsv"),
  ("a", b"a kite\n", "'' is not known"),
])
def test_bad_file_is_named(name, content, words, tmp_path):
  path = write(tmp_path / name, content)
  message = refusals.refusal(list, prompts.read_file(path))
  assert message.startswith(str(path)) and words in message


def test_missing_file_and_folder_are_named(tmp_path):
  (tmp_path / "folder.txt").mkdir()
  assert "No such file" in refusals.refusal(list, prompts.read_file(tmp_path / "none.txt"))
  assert "directory" in refusals.refusal(list, prompts.read_file(tmp_path / "folder.txt"))


# Sets on disk.


def test_set_is_read_by_folder_version_and_name(built, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(built.parent))
  for source in (built, str(built), built / "1.0.0", "both"):
    for split, expected in (("train", pairs(5)), ("test", pairs(3, "caf\u00e9"))):
      opened = prompts.open_set(source, split)
      assert len(opened) == len(expected)
      assert list(opened) == [prompts.Prompt(*pair) for pair in expected]


def test_a_path_is_no_name_of_a_built_set(built, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(built.parent))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "both").mkdir()
  (tmp_path / "both/train.txt").write_text("a new prompt\n")
  assert [one.prompt for one in prompts.open_set("./both", "train")] == ["a new prompt"]
  assert len(prompts.open_set("both", "train")) == 5
  assert "name of the split is empty" in refusals.refusal(prompts.open_set, "./both", "")


def test_set_and_file_hold_the_same(tmp_path):
  path = jsonl(tmp_path / "a.jsonl")
  folder = prompt_folders.build("a", {"test": prompts.read_file(path)}, tmp_path)
  from_set, from_file = prompts.open_set(folder, "test"), prompts.open_set(path, "test")
  assert [prompt.metadata for prompt in from_set] == RECORDS
  assert list(from_set) == list(from_file)
  assert from_set.fingerprint() == from_file.fingerprint()


def test_the_records_of_several_files_keep_their_order(tmp_path, monkeypatch):
  monkeypatch.setattr(prompt_folders, "_PROMPTS_PER_FILE", 1000)
  folder = prompt_folders.build("many", {"train": pairs(2500)}, tmp_path)
  assert len(list(folder.glob("*train*"))) == 3
  train = prompts.open_set(folder, "train")
  assert [train[i].metadata["n"] for i in range(0, 2500, 7)] == list(range(0, 2500, 7))
  assert train[2499].prompt == "prompt 2499"


@pytest.mark.parametrize("i", [-1, 5])
def test_index_beyond_the_set(built, i):
  with pytest.raises(IndexError):
    prompts.open_set(built, "train")[i]


def test_set_is_a_tfds_data_source(built):
  import tensorflow_datasets as tfds

  source = tfds.data_source("both", split="test", data_dir=built.parent)
  assert len(source) == 3
  assert source[1] == {"prompt": "caf\u00e9 1".encode(), "metadata": b'{"n": 1}'}


def test_tensorflow_is_not_imported_even_where_it_is_installed(tmp_path):
  (tmp_path / "tensorflow").mkdir()
  mark = tmp_path / "imported"
  write(tmp_path / "tensorflow" / "__init__.py", f"open({str(mark)!r}, 'w').close()\n")
  program = """
import importlib.util, pathlib, sys
sys.path.insert(0, sys.argv[2])
assert importlib.util.find_spec("tensorflow") is not None
from unigrpo_jax.data import __main__, prompts
assert "tensorflow_datasets" not in sys.modules  # takes a second, and only sets on disk need it
__main__.main(["--build", sys.argv[1], "--name", "a", "--out", sys.argv[2]])
print(prompts.open_set(pathlib.Path(sys.argv[2]) / "a", "train")[0].prompt)
"""
  path = write(tmp_path / "a.txt", "a kite\n")
  done = subprocess.run(
    [sys.executable, "-c", program, path, tmp_path], capture_output=True, text=True, cwd=ROOT
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines() == [
    f"{tmp_path}/a/1.0.0, split train: 1 prompts, the first 'a kite'", "a kite",
  ]
  assert not mark.exists()


def test_the_same_source_gives_the_same_bytes(built, tmp_path):
  prompt_folders.build("both", {"train": pairs(5), "test": pairs(3, "caf\u00e9")}, tmp_path)
  assert listing(tmp_path / "both") == listing(built)
  for path in built.rglob("*"):
    if path.is_file():
      assert (tmp_path / "both" / path.relative_to(built)).read_bytes() == path.read_bytes()


def broken_source():
  yield "fine", {}
  raise errors.InputError("line 2")


def interrupted_source():
  yield "fine", {}
  raise KeyboardInterrupt


@pytest.mark.parametrize("source, error", [
  (broken_source, errors.InputError), (interrupted_source, KeyboardInterrupt),
])
def test_failed_build_leaves_nothing(source, error, tmp_path):
  with pytest.raises(error):
    prompt_folders.build("a", {"train": pairs(2), "test": source()}, tmp_path / "new" / "deep")
  assert listing(tmp_path) == []


def test_overwrite_replaces_only_after_success_and_only_a_set(tmp_path):
  prompt_folders.build("a", {"train": pairs(2)}, tmp_path)
  before = listing(tmp_path)
  refusal = functools.partial(refusals.refusal, prompt_folders.build)
  assert "exists already" in refusal("a", {"train": pairs(3)}, tmp_path)
  assert refusal("a", {"train": broken_source()}, tmp_path, overwrite=True) == "line 2"
  assert listing(tmp_path) == before
  assert len(prompts.open_set(tmp_path / "a", "train")) == 2
  prompt_folders.build("a", {"test": pairs(3)}, tmp_path, overwrite=True)
  assert len(prompts.open_set(tmp_path / "a", "test")) == 3
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]

  write(tmp_path / "b", "mine")
  assert "not a prompt set" in refusal("b", {"train": pairs(3)}, tmp_path, overwrite=True)
  assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("name, split", [
  ("A", "train"), ("1a", "train"), ("a/b", "train"), ("", "train"), ("a", "all"), ("a", "te st"),
])
def test_impossible_names_are_refused(name, split, tmp_path):
  assert "lower-case" in refusals.refusal(prompt_folders.build, name, {split: pairs(1)}, tmp_path)
  assert listing(tmp_path) == []


def test_missing_set_or_split_is_named(built, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  message = refusals.refusal(prompts.open_set, "nothing", "train")
  assert message.startswith("nothing: no such prompt set") and str(tmp_path) in message
  assert "no such prompt set" in refusals.refusal(prompts.open_set, tmp_path, "train")
  assert "split='val' is none of test, train" in refusals.refusal(prompts.open_set, built, "val")
  message = refusals.refusal(prompts.open_set, "iconworld", "tset")
  assert "iconworld: split='tset' is none of train, validation, test; did you mean" in message
  assert "No such file" in refusals.refusal(prompts.open_set, tmp_path / "a.jsonl", "train")


@pytest.mark.parametrize("pattern, content, words", [
  ("*train*", b"", "record 4 of split train cannot be read"),
  ("*train*", bytes(100_000), "record 4 of split train cannot be read"),
  ("*train*", None, "no such file, though the set lists it"),
  ("dataset_info.json", b"{", "not a readable TFDS folder"),
  ("features.json", b"{}", "not a readable TFDS folder"),
  ("features.json", None, "not a readable TFDS folder"),
])
def test_damaged_set_is_refused(pattern, content, words, tmp_path):
  folder = prompt_folders.build("a", {"train": pairs(5)}, tmp_path)
  [path] = folder.glob(pattern)
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  message = refusals.refusal(prompts.open_set, folder, "train")
  assert words in message and "build it again" in message


def test_flipped_bit_in_a_record_is_found(tmp_path):
  folder = prompt_folders.build("a", {"train": pairs(5)}, tmp_path)
  [path] = folder.glob("*train*")
  data = bytearray(path.read_bytes())
  data[data.index(b"prompt 1")] ^= 1
  path.write_bytes(data)
  train = prompts.open_set(folder, "train")
  assert train[0].prompt == "prompt 0"
  assert "record 1 of split train cannot be read" in refusals.refusal(train.__getitem__, 1)


def test_other_tfds_folder_is_refused(tmp_path):
  folder = prompt_folders.build("a", {"train": pairs(5)}, tmp_path)
  features = (folder / "features.json").read_text()
  (folder / "features.json").write_text(features.replace('"prompt"', '"label"'))
  message = refusals.refusal(prompts.open_set, folder, "train")
  assert "its records hold label, metadata;" in message


# The command.


def test_command_builds_several_splits(tmp_path, capsys):
  train, test = write(tmp_path / "a.txt", "one\ntwo\n"), jsonl(tmp_path / "b.jsonl")
  command.main([
    f"--build={train}", "--split=train", f"--build={test}", "--split=test", "--name=mine",
    f"--out={tmp_path / 'sets'}",
  ])
  folder = tmp_path / "sets" / "mine" / "1.0.0"
  assert capsys.readouterr().out.splitlines() == [
    f"{folder}, split train: 2 prompts, the first 'one'",
    f"{folder}, split test: 3 prompts, the first 'one kite'",
  ]
  assert [p.metadata for p in prompts.open_set(folder, "test")] == RECORDS


@pytest.mark.parametrize("arguments, words", [
  (["--build=FILE", "--build=FILE", "--name=a"], "2 --build and 0 --split"),
  (["--build=FILE", "--split=a", "--split=b", "--name=a"], "1 --build and 2 --split"),
  (["--build=FILE", "--split=a", "--build=FILE", "--split=a", "--name=a"], "given twice"),
  (["--build=FILE", "--name=a", "--count=3"], "--count=3 is for iconworld"),
  (["--build=iconworld", "--name=a", "--count=0"], "--count=0"),
  (["--build=iconworld", "--name=a", "--prompt_key=b"], "--prompt_key=b names a column or key of"),
  (["--build=FILE", "--name=a", "--prompt_key="], "--prompt_key= names a column or key of a file"),
  (["--build=iconworld", "--split=tset", "--name=a"], "split='tset' is none of train, validation"),
  (["--build=nothing.txt", "--name=a"], "--build=nothing.txt: no such file"),
  (["--build=FILE", "--name=A"], "--name=A"),
  (["--build=FILE", "--name=iconworld"], "--name=iconworld is a generated set"),
  (["--build=FILE"], "give --build and --name, or --import"),
  (["--name=a"], "give --build and --name, or --import"),
])
def test_bad_arguments_are_refused(arguments, words, tmp_path):
  path = write(tmp_path / "a.txt", "one\n")
  arguments = [argument.replace("FILE", str(path)) for argument in arguments]
  out = tmp_path / "out"
  assert words in refusals.refusal(command.main, [*arguments, f"--out={out}"])
  assert not out.exists()


def test_place_that_cannot_be_written_to_is_named(tmp_path):
  path = write(tmp_path / "a.txt", "one\n")
  message = refusals.refusal(command.main, [f"--build={path}", "--name=a", f"--out={path}"])
  assert str(path) in message and "cannot be written to" in message


def test_full_disk_is_one_line(tmp_path):
  """A limit on the size of a file stands for the disk: either way a write fails midway."""
  program = (
    "import resource, sys; from unigrpo_jax import errors; from unigrpo_jax.data import __main__; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
    "errors.report(lambda: __main__.main(sys.argv[1:]))"
  )
  path, out = write(tmp_path / "a.txt", "one\n"), tmp_path / "out"
  done = subprocess.run(
    [sys.executable, "-c", program, f"--build={path}", "--name=a", f"--out={out}"],
    capture_output=True, text=True, cwd=ROOT,
  )
  assert (done.returncode, done.stdout) == (1, "")
  [line] = done.stderr.splitlines()
  assert line.startswith(f"error: {out}/a") and "free disk space" in line
  assert not out.exists()


def test_bad_line_ends_the_command_with_one_line_and_status_2(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n{"prompt": 7}\n')
  done = subprocess.run(
    [sys.executable, "-m", "unigrpo_jax.data", f"--build={path}", "--name=a", f"--out={tmp_path}"],
    capture_output=True, text=True, cwd=ROOT,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {path}, line 2: prompt=7 must be text\n"
  assert listing(tmp_path) == ["a.jsonl"]


def test_long_builds_print_their_progress(capsys, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS", 0.0)
  assert list(progress.each(pairs(100), 100, "train", unit="prompts")) == pairs(100)
  lines = capsys.readouterr().err.splitlines()
  assert lines[3].startswith("train: 3 of 100 prompts, 00:00 elapsed, ")


# IconWorld.


@pytest.mark.parametrize("split", prompts.ICONWORLD_COUNTS)
def test_iconworld_needs_no_building_and_is_the_same_when_built(split, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setitem(prompts.ICONWORLD_COUNTS, split, 40)
  unbuilt = list(prompts.open_set("iconworld", split))
  assert len(unbuilt) == 40
  assert all(p.prompt and p.metadata["tag"] and p.metadata["include"] for p in unbuilt)
  command.main(["--build=iconworld", f"--split={split}", "--name=world"])
  assert list(prompts.open_set("world", split)) == unbuilt


def test_iconworld_is_built_with_all_its_splits(tmp_path):
  command.main(["--build=iconworld", "--name=world", "--count=5", f"--out={tmp_path}"])
  for split in ("train", "validation", "test"):
    assert len(prompts.open_set(tmp_path / "world", split)) == 5


# Words.


def test_words_quote_the_text_of_their_metadata_and_share_none_between_splits():
  texts = {}
  for split, count in (("train", 2000), ("validation", 200), ("test", 1000)):
    made = prompts.generated("words", split, count)
    assert len(made) == count == len({prompt for prompt, _ in made})
    for prompt, metadata in made:
      assert prompt.split('"')[1] == metadata["text"] and prompt.count('"') == 2
      assert metadata["tag"].split()[0] == str(len(metadata["text"].split()))
    assert {m["tag"] for _, m in made} == {"1 word", "2 words", "3 words", "4 words"}
    assert len({prompt.replace(f'"{m["text"]}"', "") for prompt, m in made}) == 20
    texts[split] = {m["text"].lower() for _, m in made}
  assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
  assert not texts["train"] & texts["validation"]


def test_words_are_the_same_on_every_machine_and_begin_alike_whatever_the_count():
  made = prompts.generated("words", "test", 3)
  assert made == list(prompts.generated("words", "test"))[:3]
  assert prompts.PromptSet(made).fingerprint() == "7ffe4b6aa35ee07d"
  assert len(prompts.open_set("words", "test")) == 1000


def test_prompts_that_the_default_reward_cannot_score_are_refused():
  """Before anything is sampled."""
  config = config_files.load("configs/unigrpo.py")
  others = prompts.PromptSet([("a red car", {})] * 3)
  parts.check_prompts(rl.read(config), prompts.open_set("iconworld", "train"))
  with pytest.raises(errors.InputError, match="iconworld_soft scores .* 3 of the first 3 prompts"):
    parts.check_prompts(rl.read(config), others)
  for weights in ({"brightness": 1.0}, {"brightness": 1.0, "iconworld_soft": 0.0}):
    config.rewards = weights
    parts.check_prompts(rl.read(config), others)
