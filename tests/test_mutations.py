"""Files that people hand in, damaged at random: each loads or is refused in one line.

  python -m pytest -m slow tests/test_mutations.py -s        # 10,000 a kind; prints the table
"""

import json
import os
import random
import re
import resource
import shutil
import struct
import time

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors
from unigrpo_jax.data import prompts, tokenizer
from unigrpo_jax.models import adapters, safetensors_files, weight_files, weights
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import checkpoints, conversion, folders, metrics
from unigrpo_jax.supervised import corpus
from unigrpo_jax.tools.report import workdir

SECONDS, BYTES = 20, 2**30  # that one mutation may take: processor time, and memory of all of them
DEEP = "[" * 3000 + "]" * 3000
# JSON texts that take the place of a value.
VALUES = [
  "null", "true", "-1", "0", "1", "0.5", "-0.0", "2147483648", "9223372036854775808",
  "1" + "0" * 40, "9" * 5000, "1e308", "1e999", "-1e999", "NaN", "Infinity", '""', '"x"',
  '"\\u0000"', '"\\ud800"', '"../../outside"', '"/etc/passwd"', "[]", "{}", "[[]]", "[1, 2, 3]",
  '["a"]', '{"a": {}}', DEEP,
  '"F32"', "[0, 0]", "[-8, 0]", "[1" + "0" * 18 + "]", '"' + "a" * 70000 + '"',
]


def mutate_json(text: str, rng: random.Random) -> str:
  """A value or a name of a JSON text replaced, removed, or there twice."""
  spots = [m.span() for m in re.finditer(
    r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\[[^\[\]{}]*\]|\{[^\[\]{}]*\}', text)]
  if not spots:
    return text
  start, stop = rng.choice(spots)
  choice = rng.random()
  if choice < 0.8:
    new = rng.choice(VALUES)
  elif choice < 0.9:
    new = ""
  else:
    new = text[start:stop] + "," + text[start:stop]
  return text[:start] + new + text[stop:]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
  """Bytes changed, cut out, put in, or doubled."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(data) + 1)
    length = rng.choice([1, 1, 2, 8, 64])
    kind = rng.randrange(5)
    if kind == 0:
      data[at : at + 1] = bytes([rng.randrange(256)])
    elif kind == 1:
      del data[at : at + length]
    elif kind == 2:
      data[at:at] = rng.randbytes(length)
    elif kind == 3:
      data[at:at] = data[at : at + length]
    else:
      del data[at:]
  return bytes(data)


def mutate(data: bytes, rng: random.Random) -> bytes:
  """A damaged file: by its bytes, or by a value of its JSON, of a line or of a header."""
  if rng.random() < 0.4:
    return mutate_bytes(data, rng)
  if data[8:9] == b"{":  # safetensors
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length].decode(), rng).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
  return mutate_json(data.decode(), rng).encode("utf-8", "surrogatepass")


def _tensors(path, tensors):
  shapes = {name: (value.dtype, value.shape) for name, value in tensors.items()}
  pieces = ((name, 0, value) for name, value in tensors.items())
  safetensors_files.write(path, safetensors_files.Contents(shapes, pieces, {"format": "pt"}))


def _safetensors(folder, golden):
  path = folder / "a.safetensors"
  _tensors(path, {f"layer.{i}": np.full((2, i), i, np.float32) for i in range(4)})

  def load():
    with safetensors_files.SafetensorsFile(path) as file:
      for name in file.entries:
        file.read(name)
  return path, load


def _index(folder, golden):
  names = [f"language_model.{i}" for i in range(4)]
  for i, name in enumerate(names):
    _tensors(folder / f"m-0000{i + 1}-of-00004.safetensors", {name: np.zeros(2, np.float32)})
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": {
    name: f"m-0000{i + 1}-of-00004.safetensors" for i, name in enumerate(names)}}))

  def load():
    with weight_files.Tensors(folder, "ema.safetensors") as file:
      for name in file.entries:
        file.read(name)
  return path, load


def _config(name):
  def make(folder, golden):
    for path in golden.iterdir():
      if path.suffix in (".json", ".safetensors"):
        shutil.copyfile(path, folder / path.name)

    def load():
      config = config_lib.read_config(folder)
      if config.llm.num_layers + config.vit.num_layers < 100:  # the table of more takes seconds
        weights.OfficialReader(folder, config).close()
      tokenizer.load(folder)
    return folder / name, load
  return make


def _tokenizer(folder, golden):
  for path in folders.TINY_FOLDER.iterdir():
    shutil.copyfile(path, folder / path.name)
  return folder / "tokenizer_config.json", lambda: tokenizer.load(folder)


def _manifest(folder, golden):
  conversion.convert(golden, folder / "converted")
  opened = folders.open_folder(folder / "converted")

  def load():
    conversion._read_manifest(folders.open_folder(opened.path))
  return opened.path / folders.MANIFEST, load


def _adapter(folder, golden):
  path = folder / adapters.CONFIG_FILE
  path.write_text(json.dumps({
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"],
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "use_rslora": False,
  }))
  return path, lambda: adapters.read_config(folder)


def _prompts(name, text):
  def make(folder, golden):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path, lambda: list(prompts.read_file(path))
  return make


def _shards(folder, golden):
  PIL.Image.new("RGB", (4, 4)).save(folder / "a.png")
  path = folder / "a.jsonl"
  path.write_text(
    '{"prompt": "a kite", "image": "a.png", "reasoning": "<think>x</think>"}\n'
    '{"prompt": "how many?", "source": "a.png", "answer": "two"}\n')
  return path, lambda: [corpus.shards(folder, seed=0)(row, None) for row in range(2)]


def _metrics(folder, golden):
  path = folder / "metrics.jsonl"
  text = "".join(f'{{"step": {i}, "loss": {i / 2}, "eval/plain/reward": null}}\n' for i in range(4))
  path.write_text(text)

  def load():
    rows, _ = metrics.read(path)
    metrics.by_step(rows)
    metrics.MetricsLog(["jsonl"], folder, "run", {}, first_step=2).close()
    if rows:
      workdir.read(folder)
  return path, load


def _report(name, value):
  def make(folder, golden):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

    def load():
      run = workdir.read(folder)
      for samples in run.evaluations.values():
        for sample in samples:
          assert sample.image is None or sample.image.is_relative_to(folder.resolve())
      run.evaluated("reward")
    return path, load
  return make


def _checkpoint(folder, golden):
  saved = checkpoints.TrainCheckpoints(folder / "checkpoints", keep=2)
  for step in (1, 2):
    saved.save(step, {"a": np.zeros(2, np.float32)}, {"config": {"steps": 3}, "position": 5})
  saved.close()
  step = folder / "checkpoints" / "2"
  paths = [path for path in step.rglob("*") if b"position" in (
    path.read_bytes() if path.is_file() else b"")]

  def load():
    opened = checkpoints.TrainCheckpoints(folder / "checkpoints", keep=2)
    try:
      opened.newest(opened.record, move=False)
    finally:
      opened.close()
  return paths[0], load


EVALUATION = {"title": "t", "modes": ["plain"], "rows": [{
  "mode": "plain", "category": "all", "prompt": "a kite", "text": None,
  "rewards": {"reward": 0.5}, "image": "images/plain_00000.png"}]}
KINDS = {
  "safetensors header": _safetensors, "safetensors index": _index,
  "llm_config.json": _config("llm_config.json"), "vit_config.json": _config("vit_config.json"),
  "bagel_config.json": _config("bagel_config.json"), "tokenizer_config.json": _tokenizer,
  "unigrpo_jax.json": _manifest, "adapter_config.json": _adapter,
  "prompts .txt": _prompts("p.txt", "a red kite\ntwo boats \u8272\n"),
  "prompts .jsonl": _prompts("p.jsonl", (
    '{"prompt": "a red kite", "tag": "color", "include": [{"class": "kite", "count": 1}]}\n'
    '{"prompt": "two boats", "n": 2, "exclude": [{"class": "boat", "count": 3}]}\n')),
  "prompts .json": _prompts("p.json", '[{"Prompt": "two boats \u8272", "n": 2}]'),
  "prompts .csv": _prompts("p.csv", 'prompt,tag,points\n"a ""red"" kite",color,"[""a?""]"\n'),
  "prompts .tsv": _prompts("p.tsv", "Prompt\tCategory\ntwo boats \u8272\tcolor\n"),
  "shards .jsonl": _shards, "metrics.jsonl": _metrics,
  "config.json": _report("config.json", {"seed": 0, "rewards": {"brightness": 1.0}}),
  "run.json": _report("run.json", {"run_id": "a", "versions": {"jax": "0.10"}, "devices": "x"}),
  "results.json": _report("evaluations/1/results.json", EVALUATION),
  "checkpoint metadata": _checkpoint,
}
# Milliseconds each, through libraries.
SLOW = {"tokenizer_config.json", "checkpoint metadata"}


def _files(folder):
  return {path for path in folder.rglob("*") if path.is_file()}


def _run(name, folder, golden, count, seed=0):
  """(mutations, refused, loaded, the first faults) of a kind."""
  path, load = KINDS[name](folder, golden)
  original, rng = path.read_bytes(), random.Random(f"{name} {seed}")
  load()  # as it is
  load_or_refuse, before, faults = [], _files(folder.parent), []
  for number in range(count):
    data = mutate(original, rng)
    path.write_bytes(data)
    start = time.process_time()
    try:
      load()
      load_or_refuse.append("loaded")
    except errors.InputError as error:
      load_or_refuse.append("refused")
      message = errors.line(error)
      if not 20 < len(message) < 3000:
        faults.append((number, f"{len(message)} characters: {message[:80]!r}", data[:300]))
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt):
        raise
      faults.append((number, f"{type(error).__name__}: {str(error)[:200]}", data[:300]))
    if time.process_time() - start > SECONDS:
      faults.append((number, f"took {time.process_time() - start:.0f} s", data[:300]))
  path.write_bytes(original)
  new = {other for other in _files(folder.parent) - before if "checkpoints" not in str(other)}
  if new:
    faults.append((-1, f"wrote {sorted(map(str, new))[:5]}", b""))
  return count, load_or_refuse.count("refused"), load_or_refuse.count("loaded"), faults


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  return folder


def _check(name, folder, golden, count):
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  mutations, refused, loaded, faults = _run(
    name, folder, golden, count, seed=int(os.environ.get("MUTATION_SEED", 0)))
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
  print(f"| {name} | {mutations:,} | {refused:,} | {loaded:,} | {len(faults)} |")
  assert not faults, f"{len(faults)} faults: " + "; ".join(map(str, faults[:5]))
  assert refused or name in TOLERANT, "nothing was refused: what is mutated is not read"
  assert grown < BYTES


# What the report reads is noted there, not refused.
TOLERANT = {"config.json", "run.json", "results.json", "metrics.jsonl", "checkpoint metadata"}


@pytest.mark.parametrize("name", KINDS)
def test_some_damaged_files(name, folder, golden):
  _check(name, folder, golden, 5 if name in SLOW else 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(name, folder, golden):
  _check(name, folder, golden, int(os.environ.get("MUTATIONS", 1000 if name in SLOW else 10_000)))


# One mutation in hundreds: each was a traceback.
RARE = [
  ("results.json", '"images/plain_00000.png"', '"\\ud800"'),
  ("results.json", '"images/plain_00000.png"', '"\\u0000"'),
  ("tokenizer_config.json", '"model_max_length": ', '"model_max_length": [], "was": '),
  ("checkpoint metadata", '"metrics"', '"\\ud800"'),
]


@pytest.mark.parametrize(("name", "old", "new"), RARE)
def test_what_rare_mutations_found(name, old, new, folder, golden):
  path, load = KINDS[name](folder, golden)
  text = path.read_text(encoding="utf-8")
  assert text.count(old) == 1
  path.write_text(text.replace(old, new), encoding="utf-8")
  load()


def test_the_mutations_reach_what_they_damage():
  rng = random.Random(0)
  text = json.dumps(EVALUATION)
  assert len({mutate_json(text, rng) for _ in range(200)}) > 150
