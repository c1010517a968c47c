"""Whether two checkouts compute the same numbers, bit for bit.

  python -m tests.same_numbers record CHECKOUT OUT [--only NAME ...] [--small]
  python -m tests.same_numbers compare OUT_A OUT_B

`record` trains three iterations of every algorithm and draws with every mode in a checkout, by its
own command lines; what OUT already holds is not made again. `compare` holds metrics without clock
fields, parameters, optimizer states, pictures and texts of two such folders against each other,
one line each. Both folders have to be of the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np

UNIGRPO = "configs/unigrpo.py:tiny"
RUNS = {
  "tiny": [UNIGRPO],
  "lora": ["configs/unigrpo.py:tiny,lora"],
  "cfg": ["configs/unigrpo.py:tiny,cfg"],
  "text_grpo": ["configs/text_grpo.py:tiny"],
  "flow_grpo": ["configs/flow_grpo.py:tiny"],
  "flow_grpo_no_think": ["configs/flow_grpo.py:tiny,no_think"],
  "dppo": [UNIGRPO, "--config.flow.objective=dppo"],
  "nft": [UNIGRPO, "--config.flow.objective=nft"],
  "awm": [UNIGRPO, "--config.flow.objective=awm"],
  "fpo": [UNIGRPO, "--config.flow.objective=fpo"],
  # The weight of a forward process's regulariser was once scaled with the image's size.
  "nft_unscaled": [UNIGRPO, "--config.flow.objective=nft", "--config.flow.scale_with_size=False"],
  "awm_unscaled": [UNIGRPO, "--config.flow.objective=awm", "--config.flow.scale_with_size=False"],
  "fpo_unscaled": [UNIGRPO, "--config.flow.objective=fpo", "--config.flow.scale_with_size=False"],
  "sft": ["configs/sft.py:tiny"],
}
SMALL = (
  "--config.prompts_per_step=4", "--config.rollout.prompts_at_once=4", "--config.group_size=4",
  "--config.microbatch=8", "--config.rollout.num_timesteps=7",
  "--config.drift.text=1", "--config.drift.flow=1",
)
KITES = "draw half of four kites in the colour of grass"
IMAGE = "docs/tiny_bagel.png"
GENERATE = {
  "draw": ["--out=a.png"],
  "think": ["--think", "--out=a.png"],
  "edit": ["--image", "INPUT", "--out=a.png"],
  "edit_think": ["--image", "INPUT", "--think", "--out=a.png"],
  "answer": ["--image", "INPUT", "--understand", "--out=a.json"],
  "answer_think": ["--image", "INPUT", "--understand", "--think", "--out=a.json"],
}
CLOCK = ("seconds/", "share/", "trajectories_per_second", "wall_time", "time", "run_id")


def record(checkout: pathlib.Path, out: pathlib.Path, only, small: bool) -> None:
  python = checkout / ".venv/bin/python"
  out.mkdir(parents=True, exist_ok=True)

  def run(name: str, module: str, *arguments: str) -> None:
    if (out / name / "done").exists() or (only and name not in only):
      return
    (out / name).mkdir(parents=True, exist_ok=True)
    with open(out / name / "output.txt", "w") as log:
      subprocess.run(
        [python, "-m", f"unigrpo_jax.{module}", *arguments], cwd=checkout, check=True, stdout=log,
        stderr=subprocess.STDOUT,
      )
    (out / name / "done").touch()
    print(name, flush=True)

  for name, (config, *overrides) in RUNS.items():
    arguments = [f"--config={config}", f"--workdir={out / name / 'run'}", "--config.steps=3"]
    if name == "sft":
      arguments += ["--config.sequences_per_step=8", "--config.microbatch=8"]
    else:
      prompts = 20 if name in ("tiny", "flow_grpo_no_think") else 0
      arguments += [
        f"--config.eval.every={3 if prompts else 0}", "--config.eval.batch_size=20",
        f"--config.eval.prompts={max(prompts, 1)}", *(SMALL if small else ()),
      ]
    run(name, "train", *arguments, *overrides)
  source = out / "source.png"
  if not source.exists():
    import PIL.Image
    image = PIL.Image.open(checkout / IMAGE).convert("RGB")
    image.crop((0, 0, 128, 128)).resize((32, 32)).save(source)
  for name, options in GENERATE.items():
    target = f"--out={out / ('generate_' + name)}/"
    options = [o.replace("INPUT", str(source)).replace("--out=", target) for o in options]
    prompt = "how many kites are there?" if "answer" in name else KITES
    run(f"generate_{name}", "generate", "--checkpoint=tiny", f"--prompt={prompt}", *options)
  run("evaluate", "evaluate", "--checkpoint=tiny", "--prompts=20", "--modes", "plain", "think",
      "think+guidance", f"--out={out / 'evaluate' / 'results'}")


def metrics(path: pathlib.Path) -> dict[int, dict]:
  """{step: its numbers}; several rows of a step are one."""
  rows: dict[int, dict] = {}
  for line in path.read_text().splitlines():
    row = json.loads(line)
    kept = {k: v for k, v in row.items() if not k.startswith(CLOCK)}
    rows.setdefault(row["step"], {}).update(kept)
  return rows


def arrays(checkpoint: pathlib.Path) -> dict[str, str]:
  """{path of a leaf: digest}, of the newest checkpoint."""
  from orbax.checkpoint import v1 as ocp
  newest = max((p for p in checkpoint.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  out = {}
  tree = ocp.load(newest)

  def walk(node, path=()):
    if isinstance(node, dict):
      for key, value in node.items():
        walk(value, (*path, str(key)))
    elif isinstance(node, (list, tuple)):
      for key, value in enumerate(node):
        walk(value, (*path, str(key)))
    elif node is not None:
      a = np.asarray(node)
      out["/".join(path)] = hashlib.sha256(a.tobytes()).hexdigest()[:16] + str(a.shape)
  walk(tree)
  return out


def compare(a: pathlib.Path, b: pathlib.Path) -> bool:
  good = True

  def line(name: str, differences: list[str], count: int, extra: str = "") -> None:
    nonlocal good
    good &= not differences and count > 0
    verdict = "SAME" if not differences and count else "DIFFERENT"
    print(f"{verdict:10}{name:26}{count:6} values  {extra}{'; '.join(differences[:4])}")

  for name in RUNS:
    if not all((folder / name / "done").exists() for folder in (a, b)):
      print(f"{'MISSING':10}{name}")
      good = False
      continue
    one, two = (metrics(folder / name / "run/metrics.jsonl") for folder in (a, b))
    count, different, surplus = 0, [], set()
    for step in sorted(one.keys() | two.keys()):
      x, y = one.get(step, {}), two.get(step, {})
      surplus |= y.keys() - x.keys()
      for key in x:
        count += 1
        if x[key] != y.get(key):
          different.append(f"{step} {key} {x[key]!r} {y.get(key)!r}")
    new = f"(new: {', '.join(sorted(surplus))}) " if surplus else ""
    line(f"{name} metrics", different, count, new)
    one, two = (arrays(folder / name / "run/checkpoints") for folder in (a, b))
    keys = one.keys() | two.keys()
    line(f"{name} state", [k for k in sorted(keys) if one.get(k) != two.get(k)], len(keys))
  for name in [f"generate_{mode}" for mode in GENERATE] + ["evaluate/results"]:
    if not all((folder / name.split("/")[0] / "done").exists() for folder in (a, b)):
      print(f"{'MISSING':10}{name}")
      good = False
      continue
    def content(folder, name=name):
      found = {}
      for path in sorted((folder / name).rglob("*")):
        key = str(path.relative_to(folder / name))
        if path.suffix == ".png":
          import PIL.Image
          found[key] = np.asarray(PIL.Image.open(path)).tobytes()
        elif path.suffix == ".json":
          found[key] = _without_clock(json.loads(path.read_text()))
      return found
    one, two = content(a), content(b)
    keys = one.keys() | two.keys()
    line(name, [k for k in sorted(keys) if one.get(k) != two.get(k)], len(keys))
  return good


def _without_clock(value):
  if isinstance(value, dict):
    return {k: _without_clock(v) for k, v in value.items()
            if k not in ("seconds", "image", "out", "time")}
  if isinstance(value, list):
    return [_without_clock(v) for v in value]
  return value


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("action", choices=("record", "compare"))
  parser.add_argument("a", type=pathlib.Path)
  parser.add_argument("b", type=pathlib.Path)
  parser.add_argument("--only", nargs="*")
  parser.add_argument("--small", action="store_true", help="small versions, for a quick look")
  args = parser.parse_args(argv)
  if args.action == "compare":
    return 0 if compare(args.a, args.b) else 1
  record(args.a.absolute(), args.b.absolute(), args.only, args.small)
  return 0


if __name__ == "__main__":
  sys.exit(main())
