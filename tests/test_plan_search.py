"""The planner's search: what it compiles, what it drops and why, its ranking, a second start."""

import json
import subprocess

import pytest

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files
from unigrpo_jax.tools.plan import chips, command, ranking, search, topology

UNIGRPO = str(config_files.FOLDER / "unigrpo.py")
TOPOLOGY = "v5p:4x4x4"
GIVEN = {
  "tensor": (2, 4), "rollout_tensor": (2,), "prompts_at_once": (16, 32), "microbatch": (32, 64),
  "remat": ("full", "layer"),
}


def _figures(phases, times, peak=0.5, fits=True):
  """What a plan of these phases says, each of them with (compute, HBM, interconnect) seconds."""
  names = ("compute", "hbm", "interconnect")
  hbm = chips.CHIPS["v5p"].hbm
  return {
    "phases": {
      phase: {"times": dict(zip(names, times)), "exceeds": None} for phase in phases
    },
    "peak": {phase: peak * hbm for phase in phases}, "spare": 1 - peak, "fits": fits,
  }


class Compiler:
  """Sampling takes less with more prompts and less tensor; the update of "layer" at 64 is too big;
  tensor 2 with 16 prompts is refused."""

  def __init__(self):
    self.calls = []

  def __call__(self, point, phases):
    self.calls.append((dict(point), tuple(phases)))
    if tuple(phases) == search.SAMPLING:
      if point["tensor"] == 2 and point["prompts_at_once"] == 16:
        raise errors.InputError("config.rollout.prompts_at_once=16 would split a group")
      return _figures(phases, (1.0, 16 / point["prompts_at_once"], point["tensor"] / 8))
    phases = ("update",)  # What comes before it takes no time.
    compute = 48.0 if point["remat"] == "full" else 40.0
    if point["remat"] == "layer" and point["microbatch"] == 64:
      return _figures(phases, (compute, 0, 0), peak=0.95, fits=False)
    return _figures(phases, (compute, 30.0, 640 / point["microbatch"] + point["tensor"]))


@pytest.fixture
def start(tmp_path):
  """Searches with results in one file: start(compiler) -> (candidates, dropped, lines)."""
  def run(compiler, given=GIVEN, **changes):
    lines = []
    space = search.Space(config_files.load(UNIGRPO), 64, given)
    store = search.Store(tmp_path / "results.jsonl")
    return *search.Search(TOPOLOGY, space, compiler, store, lines.append, **changes).run(), lines

  run.path = tmp_path / "results.jsonl"
  return run


def test_the_update_is_compiled_for_the_fastest_sampling_of_each_layout(start):
  compiler = Compiler()
  candidates, _, lines = start(compiler)
  sampled = [point for point, phases in compiler.calls if phases == search.SAMPLING]
  updated = [point for point, phases in compiler.calls if phases == search.UPDATE]
  assert len(sampled) == 4 and len(updated) == 8
  assert {(point["tensor"], point["prompts_at_once"]) for point in updated} == {(2, 32), (4, 32)}
  assert len(lines) == 12 and all(line.startswith(TOPOLOGY) for line in lines)
  refused = "sampling 1/4: tensor 2, rollout_tensor 2, prompts_at_once 16: refused"
  assert refused in lines[0]
  # With every sampling of their layout, the slower ones too.
  assert len(candidates) == 3 + 2 * 3


def test_only_the_best_layouts_go_on(start):
  compiler = Compiler()
  candidates, _, _ = start(compiler, best=1)
  assert {result.point["tensor"] for result in candidates} == {2}


def test_ranking_by_hand(start):
  """Four phases of sampling at (1, 0.5, tensor / 8), and the update."""
  candidates, _, _ = start(Compiler())
  by_point = {tuple(result.point.values()): result.times for result in candidates}
  assert by_point[2, 2, 32, "layer", 32] == pytest.approx((4 + 40, 4 * 1.75 + 40 + 30 + 22))
  assert by_point[4, 2, 32, "full", 64] == pytest.approx((4 + 48, 4 * 2.0 + 48 + 30 + 14))
  # By max it is best as well as that of tensor 4; by sum "full" at 64 is not far behind.
  assert tuple(candidates[0].point.values()) == (2, 2, 32, "layer", 32)
  assert [sum(r.times) for r in candidates] == sorted(sum(r.times) for r in candidates)
  lost = ranking.losses(candidates)
  assert lost[0][0] == 0 and min(by_sum for _, by_sum in lost) == 0
  place = [tuple(r.point.values()) for r in candidates].index((4, 2, 32, "full", 64))
  best_sum = min(result.times[1] for result in candidates)
  assert lost[place] == pytest.approx((52 / 44 - 1, 100 / best_sum - 1))


def test_the_page_shows_what_to_paste_and_what_was_dropped(start):
  candidates, dropped, _ = start(Compiler())
  config = config_files.load(
    UNIGRPO, [
      "--config.rollout.prompts_at_once=32", "--config.rollout.tensor=2", "--config.remat=full"])
  text = ranking.render(TOPOLOGY, candidates, dropped, search.Space(config, 64).of_config())
  assert "9 candidates" in text and "* is the config as it is" in text
  marked = [line for line in text.splitlines() if line.split() and line.split()[0].endswith("*")]
  assert len(marked) == 1 and marked[0].split()[1:6] == ["4", "2", "32", "full", "64"]
  assert "18.2%" in marked[0]  # 52 s, where the best takes 44
  assert "split a group" in text and "too tight: update needs" in text
  best = text[text.index("best by the mean of both") :].splitlines()
  assert best[1:6] == [
    "  --config.mesh.tensor=2", "  --config.rollout.tensor=2",
    "  --config.rollout.prompts_at_once=32", "  --config.remat=layer", "  --config.microbatch=32",
  ]
  # Each block is what a command line takes.
  for line in best:
    if line.startswith("  --config"):
      config_files.load(UNIGRPO, [line.strip()])


def test_where_the_measures_disagree_both_are_shown():
  points = [{"remat": "full", "microbatch": 1}, {"remat": "none", "microbatch": 1}]
  figures = [_figures(["update"], times) for times in ((10, 1, 1), (6, 6, 6))]
  candidates = [search.Result(*pair) for pair in zip(points, figures)]
  text = ranking.render(TOPOLOGY, candidates, [], {})
  assert "best by the mean of both, best by sum, loses 66.7% by max:" in text
  assert "\nbest by max, loses 50.0% by sum:\n  --config.remat=none\n" in text


def test_nothing_fits():
  dropped = [search.Result({"tensor": 1}, None, "refused: too wide")]
  text = ranking.render(TOPOLOGY, [], dropped, {})
  assert "none fits" in text and "tensor 1: refused: too wide" in text


def test_a_second_start_compiles_nothing_and_says_so(start):
  first = start(Compiler())
  kept = start.path.read_text()
  compiler = Compiler()
  second = start(compiler)
  assert compiler.calls == [] and start.path.read_text() == kept
  assert [r.point for r in second[0]] == [r.point for r in first[0]]
  assert [r.times for r in second[0]] == [r.times for r in first[0]]
  assert [r.reason for r in second[1]] == [r.reason for r in first[1]]
  assert all("found, not compiled again" in line for line in second[2])
  for line in kept.splitlines():
    assert {"key", "point", "seconds", "figures", "refusal"} == json.loads(line).keys()


def test_a_search_that_was_stopped_goes_on(start):
  """In the middle of a line, too."""
  start(Compiler())
  lines = start.path.read_text().splitlines(keepends=True)
  start.path.write_text("".join(lines[:7]) + lines[7][:50])
  compiler = Compiler()
  start(compiler)
  assert len(compiler.calls) == 5
  assert start.path.read_text().splitlines(keepends=True)[8:] == lines[7:]
  start(compiler)
  assert len(compiler.calls) == 5


def test_another_config_is_compiled_again_but_not_for_what_is_searched(start, tmp_path):
  start(Compiler())
  store, hits = search.Store(start.path), []
  for override in ("--config.microbatch=32", "--config.rollout.max_tokens=512"):
    space = search.Space(config_files.load(UNIGRPO, [override]), 64, GIVEN)
    compiler = Compiler()
    search.Search(TOPOLOGY, space, compiler, store, hits.append).run()
    assert bool(compiler.calls) == ("max_tokens" in override)


def test_more_than_what_does_not_fit_is_not_compiled(start):
  compiler = Compiler()
  given = GIVEN | {"microbatch": (64, 128), "tensor": (4,)}
  _, dropped, lines = start(compiler, given)
  assert not any(point.get("microbatch") == 128 and point["remat"] == "layer"
                 for point, _ in compiler.calls)
  assert any(r.reason == "more than microbatch 64, which does not fit" for r in dropped)
  assert "not compiled" in lines[-1]


def test_sampling_is_not_refused_for_a_microbatch(start):
  """That of the first value does not divide over the ways of tensor 1; that of the second does."""
  def compiler(point, phases):
    if point["microbatch"] % (64 // point["tensor"]):
      raise errors.InputError(f"config.microbatch={point['microbatch']} does not divide")
    return _figures(phases, (1, 1, 1))

  given = GIVEN | {
    "tensor": (1, 4), "rollout_tensor": (1,), "prompts_at_once": (32,), "remat": ("full",)
  }
  candidates, dropped, _ = start(compiler, given)
  assert [(r.point["tensor"], r.point["microbatch"]) for r in candidates] == [
    (1, 64), (4, 32), (4, 64)]
  assert [r.reason for r in dropped] == ["refused: config.microbatch=32 does not divide"]


def test_a_microbatch_that_sampling_is_refused_for_is_not_kept(start):
  """With another one it is compiled."""
  def compiler(point, phases):
    if point["microbatch"] == 32:
      raise errors.InputError(f"config.microbatch={point['microbatch']} does not divide")
    return _figures(phases, (1, 1, 1))

  _, dropped, _ = start(compiler, GIVEN | {"microbatch": (32,)})
  assert len(dropped) == 4
  candidates, dropped, _ = start(compiler, GIVEN | {"microbatch": (64,)})
  assert len(candidates) == 2 * 2 * 2 and dropped == []


def test_a_crash_is_tried_again_by_the_next_start(start):
  def crash(point, phases):
    raise subprocess.CalledProcessError(-9, [], stderr="Killed")

  _, dropped, _ = start(crash)
  assert {r.reason for r in dropped} == {"the compiler failed: Killed"}
  assert len(search.Store(start.path)) == 0


@pytest.mark.parametrize("topology, tensor, microbatches", [
  ("v5p:4x4x4", 4, (16, 32, 64, 128)), ("v5p:4x4x4", 1, (64, 128, 256)),
  ("v6e:16x16", 4, (64, 128, 256)), ("v6e:4x4", 4, (4, 8, 16, 32)),
])
def test_values_by_default(topology, tensor, microbatches):
  """Rows of a microbatch follow the ways that they lie on."""
  space = search.Space(config_files.load(UNIGRPO), search.chip_count(topology))
  assert space.values("tensor", {}) == (1, 2, 4)
  assert space.values("prompts_at_once", {}) == (8, 16, 32)
  assert space.values("microbatch", {"tensor": tensor}) == microbatches
  assert "full" in space.values("remat", {})


def test_a_process_says_why_it_refuses(monkeypatch):
  """The figures of one that succeeds, the line of one that refuses, and a crash is neither."""
  ends = iter([
    (0, ""), (2, "noise\nerror: config.microbatch=1: change it\n"), (-9, "noise\nKilled\n"),
    (1, "error: /tmp: cannot be written to (No space left on device)\n")])
  seen = []

  def run(arguments, **_):
    seen.append(arguments)
    status, words = next(ends)
    if not status:
      [path] = [a.removeprefix("--json=") for a in arguments if a.startswith("--json=")]
      with open(path, "w", encoding="utf-8") as file:
        json.dump({TOPOLOGY: {"fits": True}}, file)
    return subprocess.CompletedProcess(arguments, status, "", words)

  monkeypatch.setattr(search.subprocess, "run", run)
  compile_point = search.compiler(UNIGRPO, ["--config.seed=1"], TOPOLOGY)
  point = {"tensor": 2, "prompts_at_once": 16, "remat": "full", "microbatch": 64}
  assert compile_point(point, search.UPDATE) == {"fits": True}
  assert {"--config.seed=1", "--config.mesh.tensor=2", "--config.remat=full"} <= set(seen[0])
  assert seen[0][seen[0].index("--phases") + 1 :] == ["precompute", "update"]
  with pytest.raises(errors.InputError, match="^config.microbatch=1: change it$"):
    compile_point(point, search.UPDATE)
  for _ in range(2):  # Neither is kept: the next search tries again.
    with pytest.raises(subprocess.CalledProcessError):
      compile_point(point, search.UPDATE)


def test_without_the_compiler_the_search_ends_at_once(monkeypatch, tmp_path):
  tried = []

  def run(arguments, **_):
    tried.append(arguments)
    last = f"error: --topology={TOPOLOGY}: {topology.INSTALL} (no module)"
    return subprocess.CompletedProcess(arguments, 2, stdout="", stderr=last)

  monkeypatch.setattr(search.subprocess, "run", run)
  results = tmp_path / "results.jsonl"
  with pytest.raises(errors.InputError, match="install the TPU compiler"):
    command.main([
      f"--config={UNIGRPO}", f"--topology={TOPOLOGY}", "--search", f"--results={results}",
    ])
  assert len(tried) == 1 and not results.exists()


def test_the_command(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(search, "compiler", lambda *_: Compiler())
  results = tmp_path / "new" / "results.jsonl"
  command.main([
    f"--config={UNIGRPO}", f"--topology={TOPOLOGY}", "--search", "--tensor=4,2",
    "--rollout_tensor=2", "--remat=full",
    "--prompts_at_once=32", "--microbatch=64", f"--results={results}",
  ])
  captured = capsys.readouterr()
  assert "2 candidates" in captured.out and "--config.mesh.tensor=2" in captured.out
  assert "0 results so far" in captured.err and len(results.read_text().splitlines()) == 4


@pytest.mark.parametrize("arguments, words", [
  (["--tensor=2"], "--tensor is only with --search"),
  (["--best=1"], "--best is only with --search"),
  (["--search", "--phases", "update"], "--phases is not with --search"),
  (["--search", "--tensor=two"], "--tensor=two: give whole numbers"),
  (["--search", "--microbatch=0"], "--microbatch=0 must be at least 1"),
  (["--search", "--remat=ful"], "did you mean 'full'"),
  (["--search", "--best=0"], "--best=0 must be at least 1"),
  (["--search", "--results=FILE"], "line 1: no result of a search"),
  (["--texts=FILE/x"], "--texts="),
  (["--search", "--results=PICTURE"], "line 1: no result of a search"),
])
def test_refusals(tmp_path, arguments, words):
  (tmp_path / "other.jsonl").write_text("{}\n")
  (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
  for word, name in (("FILE", "other.jsonl"), ("PICTURE", "a.png")):
    arguments = [a.replace(word, str(tmp_path / name)) for a in arguments]
  with pytest.raises(errors.InputError) as caught:
    command.main([f"--config={UNIGRPO}", f"--topology={TOPOLOGY}", *arguments])
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_topology_is_refused_before_the_first_is_compiled(monkeypatch, tmp_path):
  monkeypatch.setattr(search, "compiler", lambda *_: pytest.fail("compiled"))
  with pytest.raises(errors.InputError, match="v9:2x2"):
    command.main([
      f"--config={UNIGRPO}", "--topology", TOPOLOGY, "v9:2x2", "--search",
      f"--results={tmp_path}/results.jsonl",
    ])


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5p:4xx4", "v5p:4x0"])
def test_a_topology_that_cannot_be(name):
  with pytest.raises(errors.InputError, match="expected v5p, v6e, v5e, a colon and a shape"):
    search.chip_count(name)
