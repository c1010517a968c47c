"""The stages that make a reward model: balanced triples, the loss, the gates, refusals."""

import dataclasses
import json
import types as types_lib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors, types
from unigrpo_jax.iconworld import plans, prompts, renderer, scenes, verifier
from unigrpo_jax.reward_models import learned, metrics
from unigrpo_jax.runtime import folders
from unigrpo_jax.tools.reward_model import command, making, measuring, training, world
from unigrpo_jax.tools.reward_model import triples as triples_lib


class Painter:
  """Stands for a checkpoint: round trips blur a little, drawings are scenes, some of them wrong."""

  def round_trip(self, pixels, seed):
    return np.clip(pixels.astype(int) - 1, 0, 255).astype(np.uint8)


def drawn(rng, count):
  """[(example, its pictures)] as a policy's: right, wrong and garbled ones."""
  result = []
  for number in range(count):
    example = prompts.sample(rng, "train", prompts.CATEGORIES[number % 6])
    scenes_of = [example.scene] * 2
    scenes_of += [world.changed(rng, example.scene) for _ in range(3)]
    pictures = [renderer.render(scene, rng) for scene in scenes_of]
    pictures.append(world.nonsense(rng, pictures[0]))
    result.append((example, [world.look(picture) for picture in pictures]))
  return result


@pytest.fixture(scope="module")
def triples():
  rng = np.random.default_rng(0)
  groups = drawn(rng, 18)
  return making.collect(
    Painter(), "train", groups, groups[::-1], count=700, group_prompts=3, seed=0
  )


def test_every_cell_is_half_yes_and_neither_side_alone_tells(triples):
  cells = triples.balance()
  assert {source for source, _ in cells} == {*world.SOURCES, "group"}
  for (source, category), (count, yes) in cells.items():
    if source != "group":
      assert 2 * yes == count > 0, (source, category)
  blocks = (triples.source != "nonsense") & (triples.source != "group")
  for side in (triples.image, triples.prompt):
    # The best that one side can do: the share of "yes" that it comes with.
    _, place = np.unique(side[blocks], return_inverse=True)
    share = np.bincount(place, triples.yes[blocks]) / np.bincount(place)
    assert abs(metrics.auc(share[place], triples.yes[blocks]) - 0.5) <= 0.06
  in_block = triples.image[blocks]
  for image in np.unique(in_block):
    answers = triples.yes[blocks][in_block == image]
    assert answers.any() and not answers.all()


def test_labels_are_what_the_verifier_says_of_the_pixels_shown(triples):
  rng = np.random.default_rng(1)
  group = np.flatnonzero(triples.source == "group")
  assert set(triples.group[group]) == {0, 1, 2} and (triples.verbatim[group] != "").all()
  single = np.flatnonzero(np.char.startswith(triples.prompt, "a ")
                          & ~np.char.count(triples.prompt, " and ").astype(bool))
  for row in rng.choice(single, 40):
    words = str(triples.prompt[row]).split(" ", 1)[1]
    if words not in scenes.KINDS:
      continue
    metadata = {"include": [{"class": words, "count": 1}]}
    pixels = triples.pixels[triples.image[row]]
    assert verifier.verify(pixels, metadata)[0] == triples.yes[row]


def test_triples_survive_their_file(triples, tmp_path):
  triples.save(tmp_path / "t.npz")
  again = triples_lib.Triples.load(tmp_path / "t.npz")
  for name, value in vars(triples).items():
    np.testing.assert_array_equal(getattr(again, name), value)
  (tmp_path / "t.npz").write_bytes(b"PK broken")
  with pytest.raises(errors.InputError, match="delete it and run the stage make again"):
    triples_lib.Triples.load(tmp_path / "t.npz")
  with pytest.raises(errors.InputError, match="run the stage make first"):
    triples_lib.Triples.load(tmp_path / "none.npz")


def test_every_epoch_has_each_triple_once(triples):
  examples = triples_lib.learnt(triples, "is it {prompt}?", seed=3)
  rng = np.random.default_rng(0)
  seen = [examples(row, rng) for row in range(len(triples))]
  assert sorted(e.prompt for e in seen) == sorted(f"is it {p}?" for p in triples.prompt)
  assert sum(e.text == "yes" for e in seen) == triples.yes.sum()


def test_a_mistaken_goal_is_not_met_by_what_the_prompt_asks_for():
  rng = np.random.default_rng(2)
  for number in range(30):
    example = prompts.sample(rng, "train", prompts.CATEGORIES[number % 6])
    goal = plans.mistake(rng, example)
    right, wrong = (
      world.look(renderer.render(scene, rng))
      for scene in (example.scene, prompts.place(rng, goal))
    )
    block = world.pair("", right, wrong, example.metadata, prompts.metadata_of(goal, ""))
    if block is not None:
      return
  pytest.fail("none of 30 mistakes made a block")


def test_the_loss_by_hand():
  logits = jnp.log(jnp.array([[[0.2, 0.6, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]],
                              [[0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]]]))

  class Model:
    def apply(self, params, values, method):
      return (logits, None) if method == "packed" else values

  ones = jnp.ones((2, 2))
  batch = types.PackedBatch(
    und_ids=None, und_position=None, und_order=None, und_reach=None, label_slot=None,
    label_ids=jnp.array([[0, 3], [1, 2]]), label_weight=ones / 2,
  )
  loss, terms = training.answer_loss(
    Model(), {}, batch, {"labels": 0.5}, yes_id=0, no_id=1, vocabulary_weight=0.1
  )
  two_token = [-np.log(0.25), -np.log(0.75)]  # 0.2 / 0.8 for yes, 0.6 / 0.8 for no
  expected = [two_token[0] - 0.1 * np.log(0.2) + np.log(4),
              two_token[1] - 0.1 * np.log(0.6) - np.log(0.4)]
  np.testing.assert_allclose(loss, 0.5 * np.mean(expected), rtol=1e-6)
  np.testing.assert_allclose(terms["two_token"], 0.5 * np.mean(two_token), rtol=1e-6)
  assert terms["accuracy"] == 0.25
  padded = batch.replace(label_weight=ones.at[1].set(0))
  loss, _ = training.answer_loss(
    Model(), {}, padded, {"labels": 1.0}, yes_id=0, no_id=1, vocabulary_weight=0.1
  )
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)


def test_gates_and_page(triples):
  right = np.where(triples.yes, 2.0, -2.0)
  found = {"z": right, "no_picture": np.zeros(len(right)), "no_prompt": np.zeros(len(right)),
           "verbatim": right}
  measured = measuring.measure(triples, found, tau=1.0)
  assert all(holds for *_, holds in measuring.gates(measured)) and measured["group_auc"] == 1
  assert "MISSED" not in measuring.page(measured)
  measuring.check_gates(measured)
  found |= {"z": -right, "no_prompt": -right}
  measured = measuring.measure(triples, found, tau=1.0)
  missed = [name for name, *_, holds in measuring.gates(measured) if not holds]
  assert missed == [*measuring.GATES, "AUC with the prompt hidden"]
  assert measuring.page(measured).count("MISSED") == 5
  with pytest.raises(measuring.MissedGates, match="^missed: AUC of renders, .* hidden; ") as error:
    measuring.check_gates(measured)
  assert error.value.status == 1  # as docs/reward_model.md says


def test_pictures_of_a_file_have_a_gate_too(triples):
  """A model at chance is no reward, whatever it was measured on."""
  of_file = dataclasses.replace(
    triples, source=np.full(len(triples), "file"), group=np.full(len(triples), -1)
  )
  nothing = np.zeros(len(triples))
  found = dict.fromkeys(("z", "no_picture", "no_prompt", "verbatim"), nothing)
  with pytest.raises(measuring.MissedGates, match="^missed: AUC of the file's pictures; "):
    measuring.check_gates(measuring.measure(of_file, found, tau=1.0))
  found |= {"z": np.where(triples.yes, 2.0, -2.0)}
  measuring.check_gates(measuring.measure(of_file, found, tau=1.0))


def test_other_triples_are_asked_about_again(triples, tmp_path, monkeypatch):
  """Margins on disk are of their triples in their order, or they are not used."""
  asked = []

  def margins(model, params, pixels, prompts, label):
    asked.append(label)
    return np.arange(len(prompts), dtype=np.float32)

  monkeypatch.setattr(measuring, "margins", margins)
  model = types_lib.SimpleNamespace(question="{prompt}?", vit_max=64)
  few = dataclasses.replace(
    triples, **{name: getattr(triples, name)[:9] for name in vars(triples) if name != "pixels"})
  found = measuring.ask(model, {}, few, tmp_path / "asked.npz")
  calls = len(asked)
  again = measuring.ask(model, {}, few, tmp_path / "asked.npz")
  assert len(asked) == calls > 0 and set(again) == set(found)
  turned = dataclasses.replace(
    few, **{name: getattr(few, name)[::-1] for name in vars(few) if name != "pixels"})
  measuring.ask(model, {}, turned, tmp_path / "asked.npz")
  assert len(asked) == 2 * calls
  measuring.ask(
    types_lib.SimpleNamespace(question="is it {prompt}?", vit_max=64), {}, turned,
    tmp_path / "asked.npz")
  assert len(asked) == 3 * calls


def test_the_temperature_is_that_of_a_policys_pictures(triples):
  rows = np.isin(triples.source, ["policy", "group"])
  z = np.random.default_rng(0).normal(np.where(triples.yes, 2.0, -2.0), 2.0)
  tau = metrics.best_temperature(z[rows], triples.yes[rows])
  assert measuring.temperature(triples, {"z": np.where(rows, z, 100.0)}) == tau


def lines(tmp_path, *rows):
  for name in ("a.png", "b.png"):
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / name)
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in rows))
  return path


def test_preference_pairs_are_two_answers(tmp_path):
  path = lines(tmp_path, {"prompt": "a kite", "chosen": "a.png", "rejected": "b.png"},
               {"prompt": "a bird", "image": "a.png", "answer": "no"},
               {"prompt": "a bird", "image": "b.png", "answer": "yes"})
  examples, count = triples_lib.read_lines(path, "is it {prompt}?", seed=0)
  rng = np.random.default_rng(0)
  made = sorted((examples(row, rng).prompt, examples(row, rng).text) for row in range(count))
  assert made == [("is it a bird?", "no"), ("is it a bird?", "yes"), ("is it a kite?", "no"),
                  ("is it a kite?", "yes")]
  measured = triples_lib.load_lines(path)
  assert measured.pixels.shape == (4, 32, 32, 3) and measured.yes.sum() == 2


@pytest.mark.parametrize(("row", "words"), [
  ({"prompt": "a", "image": "a.png", "answer": "maybe"}, "1: answer='maybe' is none of yes, no"),
  ({"prompt": "a", "image": "c.png", "answer": "no"}, "line 1: image='c.png' is no file"),
  ({"prompt": "a", "chosen": "a.png"}, "line 1: keys prompt, chosen; expected"),
  ({"prompt": "a", "image": "a.png", "answer": "no"}, "0% of its 1 answers are yes"),
  ({"prompt": "a", "picture": "a.png"}, "line 1: key='picture' is none of"),
])
def test_wrong_lines_are_refused(tmp_path, row, words):
  assert words in refusal(triples_lib.read_lines, lines(tmp_path, row), "{prompt}", 0)


@pytest.mark.parametrize(("flags", "words"), [
  (["mesure", "--out=o"], "did you mean 'measure'?"),
  ([], "--out is missing"),
  (["make", "--triples=3"], "--triples=3 must be at least 300"),
  (["make", "--train_file=a.jsonl"], "give both of --train_file and --validation_file"),
  (["train", "--question=yes?"], "must hold {prompt} once"),
  (["train", "--config=configs/sft.py:reward_model"], "--config.init_from is empty"),
  (["train"], "run the stage make first"),
  (["calibrate"], "run the stage train first"),
  (["measure", "--out=o"], "run the stage calibrate first"),
])
def test_the_command_refuses(tmp_path, flags, words):
  message = refusal(command.main, [*flags, f"--workdir={tmp_path / 'work'}"])
  assert words in message and "\n" not in message


def test_a_workdir_goes_on_with_what_it_began_with(tmp_path):
  work, pairs = f"--workdir={tmp_path / 'work'}", lines(tmp_path, {"prompt": "a", "picture": "b"})
  record = tmp_path / "work" / "reward_model.json"
  refusal(command.main, ["train", work])
  begin = [f"--train_file={pairs}", f"--validation_file={pairs}", "--triples=500"]
  for stage in ("make", "train"):
    assert "key='picture'" in refusal(command.main, [stage, work, *begin])
  assert not record.exists()  # It has not begun with anything.
  lines(tmp_path, {"prompt": "a", "chosen": "a.png", "rejected": "b.png"})
  command.main(["make", work, *begin])
  message = refusal(command.main, ["train", work, "--seed=1"])
  assert message.startswith("seed=1 but the stages in") and "have 0" in message
  # What is left out is as it was.
  command.main(["make", work])
  assert "triples=600 but" in refusal(command.main, ["make", work, "--triples=600"])
  for damaged in ("[]", '{"tr'):
    record.write_text(damaged)
    message = refusal(command.main, ["make", work])
    assert message.startswith(f"{record}: ") and "JSON" in message


def test_a_prompt_that_cannot_be_asked_about_begins_nothing(tmp_path):
  pictures = {"chosen": "a.png", "rejected": "b.png"}
  path = lines(tmp_path, {"prompt": 'a sign that says "OPEN"'} | pictures)
  flags = [f"--train_file={path}", f"--validation_file={path}", f"--workdir={tmp_path / 'work'}"]
  message = refusal(command.main, ["make", *flags])
  assert message.startswith(f"{path}, line 1: ") and "holds quotation marks" in message
  assert not (tmp_path / "work" / "reward_model.json").exists()
  # Braces of a question are itself, in training as when it is asked.
  question = 'reply {"answer": "yes"} or {{no}}: is it {prompt}?'
  command.main(["make", *flags, f"--question={question}"])
  PIL.Image.new("RGB", (40, 32)).save(tmp_path / "b.png")
  message = refusal(command.main, ["make", *flags])
  assert "b.png has 40x32 pixels, the first picture 32x32" in message
  assert learned.asked(question, "a kite") == 'reply {"answer": "yes"} or {{no}}: is it a kite?'


def test_a_network_that_is_trained_keeps_its_steps(tmp_path):
  path = lines(tmp_path, {"prompt": "a", "chosen": "a.png", "rejected": "b.png"})
  flags = [f"--train_file={path}", f"--validation_file={path}", f"--workdir={tmp_path / 'work'}"]
  command.main(["make", *flags])
  (tmp_path / "work/trained").mkdir()
  (tmp_path / "work/training").mkdir()
  (tmp_path / "work/training/config.json").write_text('{"steps": 2}')
  command.main(["train", *flags, "--config.steps=2"])
  assert "config.steps=60 but" in refusal(command.main, ["train", *flags, "--config.steps=60"])


@pytest.mark.slow
def test_a_reward_model_of_preference_pairs_is_trained_and_opened(shallow, tmp_path):
  """All stages on JSON lines, with adapters, as for the release."""
  rng, rows = np.random.default_rng(0), []
  for number in range(8):
    for kind in "ab":
      PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
        tmp_path / f"{number}{kind}.png"
      )
    rows.append({"prompt": "a kite", "chosen": f"{number}a.png", "rejected": f"{number}b.png"})
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  flags = [
    f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}", f"--train_file={path}",
    f"--validation_file={path}", "--question=does it show {prompt}? yes or no",
    f"--config.init_from={shallow}", "--config.steps=2", "--config.sequences_per_step=8",
    "--config.microbatch=8", "--config.limits.images=8", "--config.checkpoint_every=1",
    "--config.lora.rank=2", "--config.mesh.fsdp=8",
  ]
  try:
    command.main(flags)
  except errors.InputError as error:  # Two steps miss gates.
    assert str(error).startswith("missed: AUC of the file's pictures")
  reward_model, params = learned.open_folder(tmp_path / "out")
  assert reward_model.prompt_form == "prompt" and reward_model.tau > 0
  before = folders.open_folder(shallow).load_params(parts=("bagel",))["bagel"]["layers"]
  assert "gen" not in params["layers"]  # What only draws is written, but not loaded to score.
  after = folders.open_folder(tmp_path / "out").load_params(parts=("bagel",))["bagel"]["layers"]
  moved = jax.tree.map(
    lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after
  )
  assert moved["und"]["attention"]["q"]["kernel"] and not any(jax.tree.leaves(moved["gen"]))
  record = json.loads((tmp_path / "out" / learned.FILE).read_text())
  assert record["metrics"]["all"]["n"] == 16 and record["metrics"]["group_auc"] is None
  command.main(["calibrate", *flags])  # again: everything is there
