"""Trains BAGEL: `python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir=runs/tiny`.

UniGRPO (arXiv 2603.23500) in one loop: prompts are thought about and drawn, images are rewarded,
rewards become advantages within their group, and one update moves both experts.
`--config=configs/sft.py` is the stage before it; see `finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import importlib.util
import json
import logging
import pathlib
import time

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from unigrpo_jax import errors, finetune, rewards, types
from unigrpo_jax.algorithms import objective
from unigrpo_jax.benchmarks import evaluation
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline, rollout
from unigrpo_jax.losses import advantages
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.recipe import recipe
from unigrpo_jax.runtime import host_flags, hosts, metrics, resumption, runs, sharding

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/sft.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics; a run that "
                               "finds its own checkpoints there goes on.")

for _name, _kind, _words in host_flags.FLAGS:
  (flags.DEFINE_string if _kind is str else flags.DEFINE_integer)(_name, None, _words)

RESUMABLE = resumption.RESUMABLE | {
  "eval", "drift", "reward.threads", "reward.max_failed_fraction",
  # These change memory and speed.
  "rollout.prompts_at_once", "rollout.layout", "text.chunk", "microbatch", "remat",
}


def train(config, workdir: pathlib.Path, devices=None) -> types.TrainState:
  """Runs the training that `config` describes, in or from `workdir`; returns its last state.

  Args:
    config: see `configs/unigrpo.py`.
    workdir: holds the run's checkpoints, metrics and evaluations.
    devices: to train on; None: all of them.

  Raises:
    InputError: the config is impossible, or the run cannot go on; says why.
  """
  # --- Model and optimizer.
  with hosts.raise_on_all_hosts():
    network = runs.open_network(config, devices)
    recipe.check(config, network)
    optimizer = runs.make_optimizer(config)
  layout = runs.state_layout(
    network, optimizer, ema=config.ema_decay > 0, reference=recipe.copies_reference(config)
  )

  # --- Prompts, rewards, evaluation.
  with hosts.raise_on_all_hosts():
    prompt_set = prompts_lib.open_set(config.prompts.source, config.prompts.split)
    stream = prompts_lib.PromptStream(prompt_set, config.seed, config.prompts_per_step)
    scorer = recipe.make_scorer(config)
    fingerprint = prompt_set.fingerprint()
  hosts.compare({f"prompts of {config.prompts.source}": fingerprint})
  vae = vae_lib.VAE(network.folder.config.vae)
  vae_params = network.folder.load_params(
    dtype=jnp.float32, parts=("vae",),
    shardings=pipeline.param_shardings(network.model, network.mesh, ("vae",)),
  )["vae"]
  sampler = rollout.Sampler(
    network.model, vae, vae_params, network.tokenizer, network.mesh,
    recipe.rollout_settings(config, network.mesh),
  )
  with hosts.raise_on_all_hosts():
    evaluate = make_evaluation(config, network, sampler, vae_params, scorer, workdir)

  # --- State: 1. resume, else 2. the folder's network, else 3. random weights.
  saved, state, record = runs.resume_or_start(
    workdir, config, network, optimizer, layout, RESUMABLE | recipe.transport(config)
  )
  plain = json.loads(config.to_json())
  resumed, first = bool(record), hosts.broadcast(saved.latest) or 0
  if resumed:
    if record.get("prompts", fingerprint) != fingerprint:
      raise errors.InputError(
        f"config.prompts.source={config.prompts.source!r} has other prompts than when the run "
        "began; give it back its prompts, or choose a new --workdir"
      )
    stream.restore(record["prompt_position"])
  else:
    with hosts.raise_on_all_hosts():
      for prompt in prompt_set:  # Rather than when its turn comes.
        sampler.encode_prompts([prompt.prompt])
  run_id = runs.introduce(workdir, plain, network, state.params, record.get("run_id"))

  # --- The update.
  update_fn = recipe.make_update(config, network, optimizer, sampler, layout[1])
  limits = recipe.drift_limits(config, network)

  # --- The loop.
  print_start(config, network, state, workdir, first)
  # What there is to tell of the last iteration, unless an earlier resumption has told it.
  untold = {} if hosts.broadcast(runs.told(workdir, first)) else record.get("untold", {})
  with hosts.raise_on_all_hosts():
    log = runs.open_log(workdir, plain, run_id, first - bool(untold) if resumed else -1)
  clock, timer = metrics.Clock(first, config.steps), metrics.PhaseTimer()
  remember = lambda: {
    "config": plain, "run_id": run_id, "prompts": fingerprint, "prompt_position": stream.state(),
  }
  with (
    sharding.activate(network.mesh), runs.CompileTimer() as compiling,
    runs.stop_on_signal() as stopping,
  ):
    # The state before the first step is evaluated, and one that a signal has left to be.
    results = evaluate(state, first, stopping) if untold or not resumed else {}
    if results is None:
      hosts.print_first(f"stopped by a signal at step {first}; the same command goes on")
    elif untold | results:
      log.write(first, untold | results)
    for number in () if results is None else range(first + 1, config.steps + 1):
      before = remember()
      timer.read_and_reset()
      # Think and draw; score what is drawn while the next chunk is.
      with runs.saving_before(saved, number, state, before):
        gathered = collect(config, sampler, state.params, stream.next(), number, scorer, timer,
                           stopping)
      if gathered is None:
        runs.keep(saved, number - 1, state, before)
        hosts.print_first(f"stopped by a signal in step {number}; the same command goes on")
        break
      experience, values = gathered
      # Update.
      with timer("update"), jax.transfer_guard("disallow"):
        state, found = jax.block_until_ready(update_fn(state, experience))
      del gathered, experience  # Before there is the next one.
      values |= summarise(jax.device_get(found))
      # Nothing moved where the first optimizer step was refused; then it is the state before.
      unmoved = int(state.step) == (number - 1) * runs.steps_an_iteration(config)
      with runs.saving_before(saved, number, state, before, lambda unmoved=unmoved: unmoved):
        runs.check_finite(values, number, saved, unmoved)
        check_drift(values, limits, number)
      values |= timer.read_and_reset() | {"seconds/compile": compiling.take()}
      values["trajectories_per_second"] = (
        recipe.trajectories_of(config) / values["seconds/total"]
      )
      # Evaluate, tell, save.
      unevaluated = remember() | {"untold": metrics.floats(values)}
      with runs.saving_before(saved, number + 1, state, unevaluated):
        results = evaluate(state, number, stopping)
      whole = results is not None
      if whole:
        log.write(number, values | results)
        hosts.print_first(clock.line(number, shown(values)))
      stopped = not whole or hosts.any_host(stopping.is_set())
      if number % config.checkpoint_every == 0 or number == config.steps or stopped or results:
        saved.save(
          number, state, remember() if whole else unevaluated,
          best_by(config, results) if results else None,
        )
      if stopped:
        hosts.print_first(f"stopped by a signal at step {number}; the same command goes on")
        break
    saved.close()
  log.close()
  scorer.close()
  if results is not None and saved_all(state, config):
    runs.finish(network, state, config, workdir)
  return state


def collect(
  config, sampler: rollout.Sampler, params, prompts, number: int, scorer: rewards.Scorer,
  timer: metrics.PhaseTimer, stopping,
) -> tuple[types.Experience, dict[str, float]] | None:
  """The experience of iteration `number` and what there is to tell of it; None when stopped.

  Every host samples, and scores its own trajectories; the scores, floats, are gathered, so that all
  compute the same advantages.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), number)
  steps = recipe.window_steps(config, number)
  size, group = config.rollout.prompts_at_once, config.group_size
  chunks, scores, own = [], [], []
  params = sampler.take(params)
  for first in range(0, len(prompts), size):
    part = prompts[first : first + size]
    rows = slice(first * group, (first + len(part)) * group)
    chunk = sampler.sample(params, [p.prompt for p in part], key, rows.start, steps[rows], timer)
    scores.append(scorer.submit([
      rewards.Sample(
        part[row // group].prompt, image, None if chunk.texts is None else chunk.texts[place],
        part[row // group].metadata,
      )
      for place, (row, image) in enumerate(zip(chunk.rows, chunk.images))
    ]))
    chunks.append(chunk)
    own.append(rows.start + chunk.rows)
    if hosts.any_host(stopping.is_set()):
      return None
  with timer("reward"), hosts.raise_on_all_hosts():
    scores = [future.result() for future in scores]
  reasonings = [chunk.told() for chunk in chunks]
  scores, reasonings = (
    hosts.gather_rows(
      np.concatenate(own), jax.tree.map(lambda *parts: np.concatenate(parts), *numbers),
      len(prompts) * group,
    )
    for numbers in (scores, reasonings)
  )
  groups = np.repeat(np.arange(len(prompts)), group)
  total = scorer.total(scores, groups, config.reward.normalise)
  with hosts.raise_on_all_hosts():
    scorer.check(total)
  adv, valid, told = jax.device_get(advantages.group_advantages(
    jnp.asarray(total), jnp.asarray(groups), num_groups=len(prompts), std=config.advantage.std,
    ddof=config.advantage.ddof, eps=config.advantage.eps, clip=config.advantage.clip or None,
  ))
  if not valid.any():
    raise errors.InputError(
      f"step {number}: each of the {len(prompts)} groups has a sample without a reward, and is "
      "dropped; repair the reward"
    )
  raw = scorer.total(scores)[valid]
  values = {f"reward/{name}": np.nanmean(value) for name, value in scores.items()
            if np.isfinite(value).any()}
  values |= {
    "reward/mean": raw.mean(), "reward/std": raw.std(ddof=min(config.advantage.ddof, raw.size - 1)),
    "groups/std": told["group_std_mean"], "groups/zero_std": told["zero_std_fraction"],
    "groups/dropped": told["dropped_groups"],
  }
  if reasonings:
    values |= {
      "text/length": reasonings["lengths"].mean(),
      "text/truncated": 1 - reasonings["finished"].mean(),
    }
  over_rows = functools.partial(sharding.put_rows, sampler.mesh)
  experience = join(
    [(chunk.prompt_ids, chunk.prompt_mask, chunk.text, chunk.flow) for chunk in chunks],
    over_rows(adv), over_rows(valid),
  )
  if config.flow.train and config.flow.objective in objective.FORWARD_OBJECTIVES:
    again = jax.random.fold_in(key, 2**32 - 1)  # No trajectory has that number.
    experience = noise_again(again, experience, config.rollout.window_size)
  return experience, values


@jax.jit
def join(parts, adv, valid) -> types.Experience:
  """Chunks of (prompt ids, mask, text, flow), one after the other, as one experience."""
  prompt_ids, prompt_mask, text, drawn = jax.tree.map(lambda *arrays: jnp.concatenate(arrays),
                                                      *parts)
  return types.Experience(prompt_ids, prompt_mask, text, drawn, adv, valid)


@functools.partial(jax.jit, static_argnums=2)
def noise_again(key, experience: types.Experience, draws: int) -> types.Experience:
  """Noises every finished image `draws` times, x_t = (1 - t) x_0 + t noise, t uniform."""
  x_0 = experience.flow.latents[:, None]
  rows = x_0.shape[0]
  t_key, noise_key = jax.random.split(key)
  t = jax.random.uniform(t_key, (rows, draws), minval=0.01)
  noise = jax.random.normal(noise_key, (rows, draws, *x_0.shape[2:]))
  x_t = (1 - t[..., None, None]) * x_0 + t[..., None, None] * noise
  zero = jnp.zeros_like(t)
  return experience.replace(
    flow=experience.flow.replace(
      x_t=x_t, x_next=x_t, mean=jnp.zeros_like(x_t), t=t, t_next=zero, logp=zero
    ),
    noise=noise,
  )


def summarise(found: dict[str, np.ndarray]) -> dict[str, float]:
  """One number of each metric of the update: of its last optimizer step, where ratios are widest.

  The drift is that of the first, when the trainer still is the policy that sampled. A number that
  is not finite in any step is told before those that are.
  """
  def one(name, values):
    bad = values[~np.isfinite(values)]
    return float(bad[0] if bad.size else values[0 if name.startswith("drift/") else -1])

  return {name: one(name, values) for name, values in found.items()}


def check_drift(values: dict[str, float], limits: dict[str, float], number: int) -> None:
  """Stops a run whose sampler and trainer disagree."""
  for name, limit in limits.items():
    if values.get(name, 0.0) > limit:
      raise errors.InputError(
        f"step {number}: {name}={values[name]:.3g}, at most {limit:.3g} is rounding: the trainer "
        "does not compute what the sampler did for the same parameters; if the dtype explains it, "
        f"raise config.{name.replace('/', '.').removesuffix('_scaled')}"
      )


def make_evaluation(
  config, network: runs.Network, sampler: rollout.Sampler, vae_params, scorer,
  workdir: pathlib.Path,
):
  """What evaluates a run: (state, iteration, stopping) -> numbers to log.

  There are none for iterations without an evaluation; None where `stopping` is set before it is
  done.
  """
  e = config.eval
  if not e.every:
    return lambda *_: {}
  prompt_set = prompts_lib.open_set(e.source, e.split)
  examples = [prompt_set[i] for i in range(min(e.prompts, len(prompt_set)))]
  pipe = pipeline.Pipeline(network.folder, network.model, network.tokenizer, network.mesh)
  pipe.params = {"vae": vae_params}
  modes = [evaluation.Mode.parse(mode) for mode in e.modes]

  def score(samples):
    scores = scorer.score(samples)
    return scores | {"reward": scorer.total(scores)}

  evaluate = evaluation.Evaluation(
    pipe, examples, score, settings=recipe.evaluation_settings(config), modes=modes,
    batch_size=e.batch_size, seed=config.seed, keep=e.keep,
    size=(config.rollout.height, config.rollout.width),
  )

  class Stopped(Exception):
    pass

  def run(state: types.TrainState, number: int, stopping):
    def look(_: str, done: int, total: int) -> None:
      if done < total and hosts.any_host(stopping.is_set()):
        raise Stopped

    if number % e.every and number != config.steps:
      return {}
    start = time.monotonic()
    try:
      look("", 0, len(examples))
      results = evaluate.run(sampler.take(state.averaged), look)
    except Stopped:
      return None
    with hosts.raise_on_all_hosts():
      scorer.check(np.array([row.rewards.get("reward", np.nan) for row in results.rows]))
    folder = workdir / "evaluations" / f"{number:06d}"
    with hosts.raise_on_all_hosts():
      if hosts.first():
        results.save(folder, f"after {number} steps")
    values = {
      metric(mode, name): results.mean(mode, name) for mode in modes for name in results.rewards
      if np.isfinite(results.mean(mode, name))
    }
    seconds = time.monotonic() - start
    line = ", ".join(f"{mode.name} {results.mean(mode, 'reward'):.3f}" for mode in modes)
    hosts.print_first(f"evaluated {len(examples)} prompts in {seconds:.0f} s: reward {line}")
    return values | {"seconds/evaluate": seconds}

  return run


def metric(mode: evaluation.Mode, reward: str) -> str:
  """What the log calls the mean of a reward under a mode."""
  return f"eval/{mode.name.replace(' + ', '+')}/{reward}"


def best_by(config, results: dict[str, float]) -> dict[str, float] | None:
  """The reward of an evaluation's first mode, by which the best checkpoint is known."""
  name = metric(evaluation.Mode.parse(config.eval.modes[0]), "reward")
  return {"reward": results[name]} if name in results else None


def shown(values: dict[str, float]) -> dict[str, float]:
  """What the terminal shows of a step."""
  names = ("reward/mean", "text/entropy", "text/clip_fraction", "flow/clip_fraction", "flow/mse",
           "drift/text")
  dropped = ("groups/dropped",) if values["groups/dropped"] else ()
  return {name: values[name] for name in names + dropped if name in values}


def saved_all(state: types.TrainState, config) -> bool:
  """Whether the run reached its end."""
  return int(state.step) >= runs.optimizer_steps(config)


def print_start(config, network: runs.Network, state, workdir, first: int) -> None:
  """What will run, before it compiles."""
  r, count = config.rollout, recipe.trajectories_of(config)
  held = sum(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
  )
  schedule = recipe.schedule(config, network.mesh)
  lines = [
    runs.start_line(config, network, workdir, first),
    runs.device_line(network.mesh),
    f"a step: {config.prompts_per_step} prompts x {config.group_size} = {count:,} trajectories of "
    f"{r.height} x {r.width} pixels, "
    + (f"up to {r.max_tokens} tokens of reasoning" if r.think else "without reasoning"),
    f"        {r.num_timesteps - 1} velocity evaluations, SDE window of {r.window_size} in "
    f"{tuple(r.window_range)}; {schedule.epochs} epoch(s) x {schedule.minibatches} minibatch(es) x "
    f"{schedule.microbatches} microbatch(es)",
    *runs.group_lines(config, state.params),
    f"state: {held / 2**30:.2f} GiB a device (parameters, optimizer"
    + (", moving average" if state.ema is not None else "")
    + (", reference)" if state.reference is not None else ")"),
    "compiling",
  ]
  hosts.print_first("\n".join(lines))


def parse_flags(argv: Sequence[str]) -> list[str]:
  """What absl makes of the command line; complaints are one line, not a traceback.

  Raises:
    InputError: a flag, a key of the config or a variant is unknown, or a value does not fit.
  """
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _ = _CONFIG.value.algorithm  # a file that cannot be loaded complains only now
    return rest
  except flags.Error as error:
    # Of an exception within a config file, the last line says what went wrong.
    words = str(error).strip().splitlines()[-1].strip()
    raise errors.InputError(words.removeprefix("ValueError: ")) from None
  except (AttributeError, KeyError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    words = ". ".join(str(error.args[0]).splitlines())
    raise errors.InputError(f"--config has no key {words}") from None
  except OSError:
    raise errors.InputError(
      f"--config={flags.FLAGS['config'].config_filename}: cannot be read; give a file such as "
      "configs/unigrpo.py, with a variant as in configs/unigrpo.py:tiny"
    ) from None


def main(_) -> None:
  def run():
    config = _CONFIG.value
    if config is None or not _WORKDIR.value:
      raise errors.InputError("give --config, for example configs/unigrpo.py:tiny, and --workdir")
    if importlib.util.find_spec("libtpu") is None:  # That a laptop has no TPU is no news.
      logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    hosts.from_flags(flags.FLAGS)
    workdir = pathlib.Path(_WORKDIR.value)
    if jax.config.jax_compilation_cache_dir is None:
      # A run that goes on need not compile again.
      jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    algorithms = {"sft": finetune.train, "unigrpo": train}

    def of_all_hosts():
      hosts.compare({"--workdir": str(workdir), "config": json.loads(config.to_json())})
      errors.choose("config.algorithm", config.algorithm, algorithms)
      algorithms[config.algorithm](config, workdir)

    hosts.run(of_all_hosts, lambda: runs.how_to_go_on(workdir))

  errors.report(run)


if __name__ == "__main__":
  app.run(main, flags_parser=lambda argv: errors.report(lambda: parse_flags(argv)))
