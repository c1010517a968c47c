"""Text: the forward over a growing cache, and greedy decoding."""

from __future__ import annotations

import jax
import numpy as np

from tests.parity import cases, network
from unigrpo_jax.episodes import packing

# No token has this id: a decode that the recording never let end.
NEVER = -1


@cases.case("a_text_forward")
def forward(folder, rec):
  net = folder.network
  chunks = {m[1]: rec[m[0]] for m in rec.matches(r"in_ids_(\w+)")}
  context = net.empty(1, sum(len(ids) + network.TEXT_MULTIPLE for ids in chunks.values()))
  logits = []
  for name, ids in chunks.items():
    rec.check("positions", f"in_pos_{name}", int(context.position[0]) + np.arange(len(ids)),
              cases.EXACT)
    context, (hidden,) = net.append_text(context, [ids])
    logits.append(net.logits(hidden))
    rec.check("chunks", f"out_hidden_{name}", hidden, cases.MODEL)
    rec.check("chunks", f"out_logits_{name}", logits[-1], cases.MODEL)
  network.check_cache(rec, "cache", context)
  ids = np.concatenate([*chunks.values()])
  logp = np.asarray(jax.nn.log_softmax(np.concatenate(logits)))
  rec.check("logprobs", "out_token_logprobs", logp[np.arange(len(ids) - 1), ids[1:]], cases.MODEL)


@cases.case("a_text_forward")
def training_path(folder, rec):
  net = folder.network
  ids = np.concatenate([rec[m[0]] for m in rec.matches(r"in_ids_\w+")])
  batch = packing.pack(
    [[packing.Text(ids, labels=ids)]], image_markers=folder.image_markers
  )
  hidden, _ = net.apply("packed", batch)
  rec.check("training_path", "out_logits_train_path", net.logits(np.asarray(hidden[0, : len(ids)])),
            cases.MODEL)


@cases.case("b_greedy_text")
def single(folder, rec):
  net = folder.network
  prompt, start = rec["in_prompt_ids"], rec.number("in_start_token")
  recorded = rec["out_tokens"]
  context, _ = net.append_text(net.empty(1, len(prompt) + len(recorded)), [prompt])
  rec.check("single", "in_start_position", context.position, cases.EXACT)
  rec.check("single", "out_tokens", greedy(net, context, start, len(recorded))[0], cases.EXACT)
  logits = forced(net, context, [recorded])[0]
  rec.check("single_logits", "out_step_logits", logits, cases.MODEL)
  top = np.sort(logits, axis=1)
  rec.check("single_logits", "out_min_top2_margin", (top[:, -1] - top[:, -2]).min(keepdims=True),
            cases.MODEL)
  tokens = greedy(net, context, start, len(recorded), rec.number("in_eos_id"))[0]
  rec.check("single", "out_tokens_eos", tokens, cases.EXACT)


@cases.case("b_greedy_text")
def batch(folder, rec):
  net = folder.network
  lengths = rec["in_batch_prompt_lens"]
  prompts = network.split(rec["in_batch_prompt_ids"], lengths)
  recorded = rec["out_batch_tokens"]
  start = rec.number("in_start_token")
  context, _ = net.append_text(net.empty(len(prompts), max(lengths) + len(recorded)), prompts)
  tokens = np.stack(greedy(net, context, start, len(recorded)), axis=1)
  rec.check("batch", "out_batch_tokens", tokens, cases.EXACT)
  logits = forced(net, context, list(recorded.T))
  rec.check("batch_logits", "out_batch_step_logits", np.stack(logits, axis=1), cases.MODEL)


def greedy(net, context, start: int, limit: int, end: int = NEVER) -> list[np.ndarray]:
  """Greedy tokens of each row as the official code returns them.

  The start token comes first and counts towards `limit`; the terminator is left out.
  """
  if limit < 2:
    return [np.array([start])] * len(context.position)
  rollout = net.greedy(context, start, end, limit - 1)
  rows = (np.asarray(ids)[np.asarray(mask)] for ids, mask in zip(rollout.ids, rollout.mask))
  return [np.append(start, ids[ids != end]) for ids in rows]


def forced(net, context, tokens: list[np.ndarray]) -> list[np.ndarray]:
  """Logits of each step of a decode that fed these tokens, a row each."""
  _, hidden = net.append_text(context, tokens)
  return [net.logits(h) for h in hidden]
