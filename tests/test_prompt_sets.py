"""Prompt files, prompt sets on disk, and the order in which hosts take prompts from them."""

import collections
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors
from unigrpo_jax.data import __main__ as command
from unigrpo_jax.data import builders, prompt_files, prompts

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
  return lambda: [(f"{text} {i}", json.dumps({"n": i})) for i in range(count)]


def listing(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A set of 5 training and 3 test prompts, in a folder that is looked up by name."""
  out = tmp_path_factory.mktemp("sets")
  builders.build("both", {"train": pairs(5), "test": pairs(3, "caf\u00e9")}, out)
  return out / "both"


# Files.


def test_text_file(tmp_path):
  path = write(
    tmp_path / "a.TXT",
    b"\xef\xbb\xbffirst one\r\n\r\n  a kite \xe2\x80\xa8 torn  \n \t\n\xef\xbb\xbffirst one\n"
    b"last, no newline",
  )
  expected = ["first one", "a kite \u2028 torn", "first one", "last, no newline"]
  assert list(prompt_files.read(path)) == [(prompt, "{}") for prompt in expected]


def test_geneval_metadata_is_kept_whole(tmp_path):
  lines = list(prompt_files.read(jsonl(tmp_path / "evaluation_metadata.jsonl")))
  assert [prompt for prompt, _ in lines] == [record["prompt"] for record in RECORDS]
  assert [json.loads(metadata) for _, metadata in lines] == RECORDS


def test_json_line_without_other_keys_has_no_metadata(tmp_path):
  path = write(tmp_path / "a.jsonl", '\ufeff{"prompt": " a kite "}\r\n\n{"prompt": "\\u00e9"}')
  assert list(prompt_files.read(path)) == [(" a kite ", "{}"), ("\u00e9", "{}")]


@pytest.mark.parametrize("line, words", [
  ("{", "not JSON"),
  ("a red kite", "not JSON"),
  ("[" * 100_000, "not JSON"),
  ('{"prompt": "a", "score": NaN}', "NaN"),
  ('{"prompt": "a", "score": %s}' % ("1" * 5000), "not JSON"),
  ('"a red kite"', "text; expected an object"),
  ('["a"]', "a list; expected an object"),
  ("null", "null; expected an object"),
  ('{"text": "a", "tag": "b"}', 'no key "prompt" (its keys: text, tag)'),
  ("{}", 'no key "prompt" (its keys: none)'),
  ('{"prompt": 3}', "prompt=3 is a number; expected text"),
  ('{"prompt": true}', "prompt=true is true or false; expected text"),
  ('{"prompt": ["a"]}', 'prompt=["a"] is a list; expected text'),
  ('{"prompt": null}', "prompt=null is null; expected text"),
  ('{"prompt": " "}', "the prompt is empty"),
  ('{"prompt": "a\\ud83d"}', "holds '\\ud83d'"),
  ('{"prompt": "a", "tag": "\\udcff"}', "holds '\\udcff'"),
  ('{"prompt": "a", "score": 1e999}', "1e999 is too large"),
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
  message = refusal(list, prompt_files.read(path))
  assert message.startswith(f"{path}, line 3: ") and words in message


@pytest.mark.parametrize("name, content, words", [
  ("a.txt", b"fine\ncaf\xe9\n", "line 2: byte 4 is not UTF-8"),
  ("a.txt", "fine".encode("utf-16"), "line 1: byte 1 is not UTF-8"),
  ("a.txt", "fine".encode("utf-16-le"), "line 1: holds the control character '\\x00'"),
  ("a.txt", b"one\rtwo\rthree", "line 1: holds the control character '\\r'"),
  ("a.jsonl", b'{"prompt": "caf\xe9"}', "line 1: byte 16 is not UTF-8"),
  ("a.txt", b"", "no prompts"),
  ("a.jsonl", b"\n \r\n", "no prompts"),
  ("a.tsv", b"Prompt\tNote\n", "'.tsv' is not known"),
  ("a", b"a kite\n", "'' is not known"),
])
def test_bad_file_is_named(name, content, words, tmp_path):
  path = write(tmp_path / name, content)
  message = refusal(list, prompt_files.read(path))
  assert message.startswith(str(path)) and words in message


def test_missing_file_and_folder_are_named(tmp_path):
  (tmp_path / "folder.txt").mkdir()
  assert "No such file" in refusal(list, prompt_files.read(tmp_path / "none.txt"))
  assert "directory" in refusal(list, prompt_files.read(tmp_path / "folder.txt"))


# Sets on disk.


def test_set_is_read_by_folder_version_and_name(built, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(built.parent))
  for source in (built, str(built), built / "1.0.0", "both"):
    train = prompts.open_set(source, "train")
    assert len(train) == 5
    assert list(train) == [prompts.Prompt(f"prompt {i}", {"n": i}, i) for i in range(5)]
    assert [p.prompt for p in prompts.open_set(source, "test")] == [
      f"caf\u00e9 {i}" for i in range(3)
    ]


def test_set_and_file_hold_the_same(tmp_path):
  path = jsonl(tmp_path / "a.jsonl")
  folder = builders.build("a", {"test": lambda: prompt_files.read(path)}, tmp_path)
  from_set, from_file = prompts.open_set(folder, "test"), prompts.open_set(path, "test")
  assert list(from_set) == list(from_file)
  assert [p.metadata for p in from_set] == RECORDS
  assert [p.id for p in from_set] == [0, 1, 2]


def test_thousands_keep_their_order(tmp_path):
  folder = builders.build("many", {"train": pairs(3000)}, tmp_path)
  train = prompts.open_set(folder, "train")
  assert [train[i].id for i in range(0, 3000, 7)] == list(range(0, 3000, 7))
  assert train[2999].prompt == "prompt 2999"


@pytest.mark.parametrize("i", [-1, 5])
def test_index_beyond_the_set(built, i):
  with pytest.raises(IndexError):
    prompts.open_set(built, "train")[i]


def test_set_is_a_tfds_data_source(built):
  import tensorflow_datasets as tfds

  source = tfds.data_source("both", split="test", data_dir=built.parent)
  assert len(source) == 3
  assert source[1] == {"prompt": "caf\u00e9 1".encode(), "metadata": b'{"n": 1}', "id": 1}


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
  builders.build("both", {"train": pairs(5), "test": pairs(3, "caf\u00e9")}, tmp_path)
  assert listing(tmp_path / "both") == listing(built)
  for path in built.rglob("*"):
    if path.is_file():
      assert (tmp_path / "both" / path.relative_to(built)).read_bytes() == path.read_bytes()


def broken_source():
  yield "fine", "{}"
  raise errors.InputError("line 2")


def interrupted_source():
  yield "fine", "{}"
  raise KeyboardInterrupt


@pytest.mark.parametrize("source, error", [
  (broken_source, errors.InputError), (interrupted_source, KeyboardInterrupt),
])
def test_failed_build_leaves_nothing(source, error, tmp_path):
  with pytest.raises(error):
    builders.build("a", {"train": pairs(2), "test": source}, tmp_path / "new" / "deep")
  assert listing(tmp_path) == []


def test_overwrite_replaces_only_after_success_and_only_a_set(tmp_path):
  builders.build("a", {"train": pairs(2)}, tmp_path)
  before = listing(tmp_path)
  assert "exists already" in refusal(builders.build, "a", {"train": pairs(3)}, tmp_path)
  assert refusal(
    builders.build, "a", {"train": broken_source}, tmp_path, overwrite=True
  ) == "line 2"
  assert listing(tmp_path) == before
  assert len(prompts.open_set(tmp_path / "a", "train")) == 2
  builders.build("a", {"test": pairs(3)}, tmp_path, overwrite=True)
  assert len(prompts.open_set(tmp_path / "a", "test")) == 3
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]

  write(tmp_path / "b", "mine")
  message = refusal(builders.build, "b", {"train": pairs(3)}, tmp_path, overwrite=True)
  assert "not a prompt set" in message
  assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("name, split", [
  ("A", "train"), ("1a", "train"), ("a/b", "train"), ("", "train"), ("a", "all"), ("a", "te st"),
])
def test_impossible_names_are_refused(name, split, tmp_path):
  assert "lower-case" in refusal(builders.build, name, {split: pairs(1)}, tmp_path)
  assert listing(tmp_path) == []


def test_missing_set_or_split_is_named(built, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  message = refusal(prompts.open_set, "nothing", "train")
  assert message.startswith("nothing: no such prompt set") and str(tmp_path) in message
  assert "no such prompt set" in refusal(prompts.open_set, tmp_path, "train")
  assert "no split 'val'; it has test, train" in refusal(prompts.open_set, built, "val")
  assert "No such file" in refusal(prompts.open_set, tmp_path / "a.jsonl", "train")


@pytest.mark.parametrize("pattern, content, words", [
  ("*train*", b"", "record 4 of split train cannot be read"),
  ("*train*", bytes(100_000), "record 4 of split train cannot be read"),
  ("*train*", None, "no such file, though the set lists it"),
  ("dataset_info.json", b"{", "not a readable TFDS folder"),
  ("features.json", b"{}", "not a readable TFDS folder"),
  ("features.json", None, "not a readable TFDS folder"),
])
def test_damaged_set_is_refused(pattern, content, words, tmp_path):
  folder = builders.build("a", {"train": pairs(5)}, tmp_path)
  [path] = folder.glob(pattern)
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  message = refusal(prompts.open_set, folder, "train")
  assert words in message and "build it again" in message


def test_flipped_bit_in_a_record_is_found(tmp_path):
  folder = builders.build("a", {"train": pairs(5)}, tmp_path)
  [path] = folder.glob("*train*")
  data = bytearray(path.read_bytes())
  data[data.index(b"prompt 1")] ^= 1
  path.write_bytes(data)
  train = prompts.open_set(folder, "train")
  assert train[0].prompt == "prompt 0"
  assert "record 1 of split train cannot be read" in refusal(train.__getitem__, 1)


def test_other_tfds_folder_is_refused(tmp_path):
  folder = builders.build("a", {"train": pairs(5)}, tmp_path)
  features = (folder / "features.json").read_text()
  (folder / "features.json").write_text(features.replace('"prompt"', '"label"'))
  message = refusal(prompts.open_set, folder, "train")
  assert "its records hold id, label, metadata" in message


# Order.


def numbered(count):
  return prompts.PromptSet("numbers", "train", [(f"prompt {i}", {}, i) for i in range(count)])


def test_order_is_a_permutation_by_seed_and_epoch():
  twenty = numbered(20)
  orders = [twenty.order(seed, epoch) for seed in range(3) for epoch in range(3)]
  for order in orders:
    assert sorted(order.tolist()) == list(range(20))
  assert len({tuple(order) for order in orders}) == 9
  np.testing.assert_array_equal(twenty.order(1, 2), twenty.order(1, 2))


def test_order_stays_what_it_was():
  """A checkpoint continues in this order, so no release may change it."""
  assert numbered(8).order(0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
  assert numbered(8).order(7, 1).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_order_favours_no_place():
  """The mean place of each prompt over many epochs is the middle, within 5 standard errors."""
  six = numbered(6)
  places = np.array([np.argsort(six.order(0, epoch)) for epoch in range(600)])
  error = np.sqrt(35 / 12 / 600)  # of a uniform place in 0..5
  assert np.abs(places.mean(axis=0) - 2.5).max() < 5 * error


def test_the_fingerprint_is_that_of_all_prompts_and_their_metadata(tmp_path):
  pairs = [("a kite", {}, 0), ("two birds", {"tag": "counting"}, 1)]
  of = lambda *records: prompts.PromptSet("any", "train", records).fingerprint()
  assert of(*pairs) == of(*pairs)
  changed = [
    pairs[:1], pairs[::-1], [pairs[0], ("two bird", *pairs[1][1:])],
    [pairs[0], ("two birds", {"tag": "colors"}, 1)],
  ]
  assert len({of(*records) for records in [pairs, *changed]}) == 5
  path = jsonl(tmp_path / "a.jsonl")
  folder = builders.build("a", {"train": lambda: prompt_files.read(path)}, tmp_path)
  opened = prompts.open_set(path, "train"), prompts.open_set(folder, "train")
  assert opened[0].fingerprint() == opened[1].fingerprint()


def ids(taken):
  return [prompt.id for prompt in taken]


@pytest.mark.parametrize("count, per_step", [(10, 4), (3, 8), (5, 5), (1, 2)])
def test_every_pass_takes_every_prompt_in_its_own_order(count, per_step):
  stream = prompts.PromptStream(numbered(count), 2, per_step)
  taken = sum((ids(stream.next()) for _ in range(20)), [])
  for epoch in range(len(taken) // count):
    one_pass = taken[epoch * count : (epoch + 1) * count]
    assert one_pass == numbered(count).order(2, epoch).tolist()


def test_another_stream_continues_from_the_state():
  whole = prompts.PromptStream(numbered(10), 5, 4)
  expected = [ids(whole.next()) for _ in range(9)]
  before = prompts.PromptStream(numbered(10), 5, 4)
  for _ in range(3):
    before.next()
  state = json.loads(json.dumps(before.state()))
  assert state == 12
  after = prompts.PromptStream(numbered(10), 5, 4)
  after.restore(state)
  assert [ids(after.next()) for _ in range(3, 9)] == expected[3:]


def test_restore_goes_back_too():
  stream = prompts.PromptStream(numbered(4), 0, 3)
  first = [ids(stream.next()) for _ in range(5)]
  stream.restore(np.int64(0))
  assert [ids(stream.next()) for _ in range(5)] == first


@pytest.mark.parametrize("state", [-1, 1.0, "3", None, True])
def test_bad_state_is_refused(state):
  stream = prompts.PromptStream(numbered(4), 0, 2)
  assert f"prompt position={state!r}" in refusal(stream.restore, state)


@pytest.mark.parametrize("arguments, words", [
  ((-1, 4), "seed=-1"),
  ((0, 0), "prompts_per_step=0"),
])
def test_impossible_stream_is_refused(arguments, words):
  assert words in refusal(prompts.PromptStream, numbered(8), *arguments)


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
  (["--build=iconworld", "--split=tset", "--name=a"], "has no split 'tset'"),
  (["--build=nothing.txt", "--name=a"], "--build=nothing.txt: no such file"),
  (["--build=FILE", "--name=A"], "--name=A"),
  (["--build=FILE", "--name=iconworld"], "--name=iconworld is the embedded world's own"),
  (["--build=FILE"], "--name"),
  (["--name=a"], "--build"),
])
def test_bad_arguments_are_refused(arguments, words, tmp_path):
  path = write(tmp_path / "a.txt", "one\n")
  arguments = [argument.replace("FILE", str(path)) for argument in arguments]
  out = tmp_path / "out"
  assert words in refusal(command.main, [*arguments, f"--out={out}"])
  assert not out.exists()


def test_place_that_cannot_be_written_to_is_named(tmp_path):
  path = write(tmp_path / "a.txt", "one\n")
  message = refusal(command.main, [f"--build={path}", "--name=a", f"--out={path}"])
  assert message.startswith(str(path))


def test_full_disk_is_told_in_one_line(tmp_path):
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
  assert (done.returncode, done.stdout) == (2, "")
  [line] = done.stderr.splitlines()
  assert line.startswith(f"error: {out}/a: cannot be written") and "free space" in line
  assert not out.exists()


def test_bad_line_ends_the_command_with_one_line_and_status_2(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n{"prompt": 7}\n')
  done = subprocess.run(
    [sys.executable, "-m", "unigrpo_jax.data", f"--build={path}", "--name=a", f"--out={tmp_path}"],
    capture_output=True, text=True, cwd=ROOT,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {path}, line 2: prompt=7 is a number; expected text\n"
  assert listing(tmp_path) == ["a.jsonl"]


def test_long_builds_tell_how_far_they_are(tmp_path, capsys, monkeypatch):
  clock = collections.deque(range(0, 600, 2))  # each look at the clock is two seconds later
  monkeypatch.setattr(command.time, "monotonic", clock.popleft)
  progress = command.Progress("train")
  for done in range(1, 101):
    progress(done, done, 100)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 33  # one every six seconds of two hundred
  assert lines[0] == "train: 3 prompts, 3%, 194 s left"


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


def test_iconworld_split_that_is_not_there(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert "it has train, validation, test" in refusal(prompts.open_set, "iconworld", "tset")
