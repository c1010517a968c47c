"""Trains BAGEL: `python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir=runs/tiny`.

UniGRPO (arXiv 2603.23500) in one loop: prompts are thought about and drawn, images are rewarded,
rewards become advantages within their group, and one update moves both experts.
`--config=configs/sft.py` is the stage before it; see `finetune.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import contextlib
import importlib.util
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, finetune, types
from unigrpo_jax.benchmarks import monitor, scoring, validation
from unigrpo_jax.data import files
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import rollout as rollout_lib
from unigrpo_jax.losses import advantages
from unigrpo_jax.recipe import config_files, parts, rl, sections
from unigrpo_jax.runtime import compile_cache, host_flags, hosts, sharding, state, stopping
from unigrpo_jax.runtime import run as run_lib


@hosts.holds_workdir
def train(config, workdir: pathlib.Path, devices=None) -> types.TrainState:
  """UniGRPO: think, draw, reward, compare within the group, move both experts.

  Args:
    config: see `configs/unigrpo.py`.
    workdir: holds the run's checkpoints, metrics and evaluations; a run that finds its own
      checkpoints there continues.
    devices: to train on; None: all of them.

  Returns:
    The last state.

  Raises:
    InputError: the config is impossible, or the run cannot continue; says why.
  """
  # --- What the run is: impossible numbers are refused before a weight is read.
  with hosts.raise_on_all_hosts():
    spec = rl.read(config)
    network = state.open_network(spec.network, devices)
    parts.check_fits(spec, network)
    prompt_set = prompts_lib.open_set(spec.prompts.source, spec.prompts.split)
    prompt_set = prompt_set.without_tags(spec.prompts.held_out_tags)
    prompts = prompts_lib.PromptStream(prompt_set, spec.seed, spec.prompts.per_step)
    parts.check_prompts(spec, prompt_set)
    reward_fns = parts.make_scorer(spec.rewards)
    reward_fns.ready()
    pinned = state.pinned(spec.network, network) | reward_fns.fingerprints()
    pinned |= {"prompts": prompt_set.fingerprint()} | parts.pinned(spec, network)

  # --- What samples, what scores, what evaluates.
  rollout = rollout_lib.Rollout(network, network.load_vae(), spec.rollout)
  rewards = scoring.Scoring(
    reward_fns, spec.rollout.group_size, spec.rewards.normalise, spec.rewards.watch_images
  )
  with hosts.raise_on_all_hosts():
    evaluation = validation.Validation(
      spec.evaluation, rollout, reward_fns, workdir / "evaluations"
    )

  # --- What learns: the algorithm's loss, replayed over microbatches, in one jitted update.
  algorithm = parts.make_algorithm(spec, network, rollout, prompt_set)
  optimizer = spec.optimizer.make()
  state_layout = state.layout(
    network, optimizer, ema=spec.optimizer.ema_decay is not None, reference=spec.copies_reference,
    anchor=spec.anchored,
  )
  update = parts.make_update(spec, network, algorithm, optimizer, rollout.grid, state_layout)

  # --- State: 1. this run's checkpoint, 2. the folder's weights, 3. random ones.
  run = run_lib.Run(
    workdir, spec.run, network,
    positions={"prompt_position": prompts},  # kept with every checkpoint
    pinned=pinned,  # must be the same when the run continues
  )
  if run.is_new:
    with hosts.raise_on_all_hosts():
      for prompt in prompt_set:  # One that is too long is refused now, not when its turn comes.
        rollout.prepare([prompt.prompt])
  train_state = run.restore(state_layout, lambda: state.first_state(
    network, optimizer, state_layout, random_init=spec.network.random_init, seed=spec.seed,
    adapter=spec.network.adapter,
  ))
  run.print_start(
    train_state, spec.optimizer.learning_rate, parts.describe(spec, network, train_state)
  )

  # Supervised examples, where a loss of theirs stands beside.
  examples = finetune.examples_beside(
    parts.supervised(spec), network, range(run.step, spec.run.steps)
  )
  watch = monitor.Watch(workdir / "metrics.jsonl")
  # --- The loop. An error or a signal within it saves the state that the run continues from.
  with contextlib.closing(rewards), examples as next_examples, run:
    run.evaluate(evaluation, train_state)  # before the first step, or what a stop left out
    for step in run.steps():  # saves a step that is due after its body, and ends at a signal
      key = jax.random.fold_in(jax.random.key(spec.seed), step)
      # Which denoising steps of each trajectory are recorded: those with noise, ReFL's late one.
      window = rl.window_steps(spec, step, sharding.batch_multiple(network.mesh))
      # Think and draw; each chunk is read and rewarded in threads while the next is drawn.
      params = rollout.sampler.cast_and_reshard(train_state.params)  # the network's dtype
      with hosts.raise_on_all_hosts():  # a host may fail to read its prompts
        batch = prompts.next()
      episodes, pending = [], []
      # A trajectory's randomness comes from the key and its number in the step.
      for chunk, first, episode in rollout.sample_chunks(params, batch, key, window, run.timer):
        pending.append(rewards.submit(chunk, episode, first))
        episodes.append(episode)
        run.raise_if_stopped()
      experience = algorithm.experience(episodes, batch, key)
      del params, episodes, episode  # before the update needs the memory
      # While the last rewards end, the devices replay what needs no advantages: the reference.
      with run.timer("precompute"):
        experience = update.precompute(train_state, experience)
      with run.timer("reward"):
        scores = rewards.gather(pending, len(batch), run.wait)  # the same on all hosts
      with run.timer("update"):  # with what is left of the replay
        # Compare within the group; a group with a failed reward is not valid, and counts nowhere.
        adv, valid, metrics = compare_within_groups(scores, spec)
        adv, valid = (sharding.put_rows(network.mesh, values) for values in (adv, valid))
        # Move both experts. Where a number is not finite, or the sampler was not this policy,
        # nothing moves and the run ends with the reason.
        experience = experience.replace(adv=adv, valid=valid)
        train_state, update_metrics = update(train_state, experience, next_examples())
      del experience, pending
      if spec.pictures_every and step % spec.pictures_every == 0:
        metrics |= scores.panels()  # for TensorBoard and W&B
      metrics |= watch(metrics)  # warns where the images change while the reward rises
      run.commit(train_state, metrics | update_metrics)  # a row of the log
      run.evaluate(evaluation, train_state)  # where it is due; a row of its own

  run.finish(train_state)  # exports, unless a signal stopped the run before its end
  return train_state


def compare_within_groups(
  scores: scoring.Scores, spec: rl.Spec
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
  """Rewards -> (advantages [B], which trajectories count [B], metrics); see `advantages`."""
  a = spec.advantage
  adv, valid, groups = jax.device_get(advantages.group_advantages(
    jnp.asarray(scores.total), jnp.asarray(scores.group), num_groups=spec.prompts.per_step,
    std=a.std, ddof=a.ddof, eps=a.eps, clip=a.clip,
  ))
  return adv, valid, scores.metrics(valid, a.ddof) | {
    "groups/std": groups["group_std_mean"], "groups/zero_std": groups["zero_std_fraction"],
    "groups/dropped": groups["dropped_groups"],
  }


EPILOG = """--config.KEY=VALUE changes a key of the config; the config file explains each.

examples:
  python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir=runs/tiny
  python -m unigrpo_jax.train --config=configs/unigrpo.py:lora --workdir=runs/lora \\
    --config.init_from=ByteDance-Seed/BAGEL-7B-MoT --config.prompts.source=prompts.txt \\
    --config.eval.source=held_out.txt --config.rewards="{'my_rewards:redness': 1.0}"
"""


@stopping.end_on_sigterm()
def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.train", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=EPILOG,
  )
  parser.add_argument(
    "--config", required=True, metavar="FILE[:VARIANTS]",
    help="config file, for example configs/unigrpo.py:tiny",
  )
  parser.add_argument(
    "--workdir", required=True, type=files.path,
    help="folder for checkpoints and metrics; a run that finds its own checkpoints there continues",
  )
  host_flags.add_arguments(parser)
  args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  config = config_files.load(args.config, overrides)
  algorithms = {"sft": finetune.train, "unigrpo": train}
  errors.choose("config.algorithm", config.get("algorithm"), algorithms)
  if importlib.util.find_spec("libtpu") is None:  # That a laptop has no TPU is no news.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
  hosts.from_flags(args)

  def run_on_all_hosts() -> None:
    hosts.compare({"--workdir": str(args.workdir), "config": sections.plain(config)})
    with hosts.raise_on_all_hosts():
      if hosts.first():
        run_lib.check_workdir(args.workdir)
    compile_cache.use(args.workdir.absolute() / "compiled")
    algorithms[config.algorithm](config, args.workdir)

  hosts.run(run_on_all_hosts, lambda: run_lib.continue_from(args.workdir))


if __name__ == "__main__":
  errors.report(main)
