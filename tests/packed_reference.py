"""The packed forward of BAGEL's decoder in NumPy: one sequence, one dense mask, one expert a token.

Written from the description of the network and sharing no code with the models, so that it can
disagree with them. float64 throughout.
"""

import numpy as np


def dense_mask(split_lens, modes):
  """[T, T] bool: who may attend to whom in one sample of causal, full and noise splits."""
  split = np.repeat(np.arange(len(split_lens)), split_lens)
  mode = np.array(modes)[split]
  place = np.arange(len(split))
  same = split[:, None] == split[None, :]
  causal = place[None, :] <= place[:, None]
  allowed = causal | (same & (mode != "causal")[:, None])
  return allowed & ((mode != "noise")[None, :] | same)


def decoder(params, llm, x, is_gen, position, mask):
  """Hidden states after the final norm: x [T, D], is_gen [T] bool, position [T], mask [T, T]."""
  tree = lambda node: {k: tree(v) if isinstance(v, dict) else np.asarray(v, np.float64)
                       for k, v in node.items()}
  params = tree({"layers": params["layers"], "norm": params["norm"]})
  x = np.asarray(x, np.float64)
  for layer in range(llm.num_layers):
    und, gen = (_layer(params["layers"][expert], layer) for expert in ("und", "gen"))
    x = _block(und, gen, llm, x, is_gen, position, mask)
  return _by_expert(
    is_gen, *(lambda rows, e=e: _rms(rows, params["norm"][e]["scale"], llm) for e in ("und", "gen"))
  )(x)


def _layer(node, layer):
  return {k: _layer(v, layer) if isinstance(v, dict) else v[layer] for k, v in node.items()}


def _by_expert(is_gen, und, gen):
  def apply(rows):
    a, b = und(rows), gen(rows)
    return np.where(is_gen.reshape(-1, *[1] * (a.ndim - 1)), b, a)

  return apply


def _rms(x, scale, llm):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + llm.rms_norm_eps) * scale


def _rotate(x, position, theta):
  half = x.shape[-1] // 2
  angle = position[:, None, None] * theta ** (-np.arange(half) / half)
  real, imaginary = x[..., :half], x[..., half:]
  turned = (real + 1j * imaginary) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def _block(und, gen, llm, x, is_gen, position, mask):
  def heads(p, name):
    def project(rows):
      a = p["attention"]
      y = np.einsum("td,dnh->tnh", _rms(rows, p["input_norm"]["scale"], llm), a[name]["kernel"])
      y = y + a[name]["bias"]
      if name == "v":
        return y
      return _rotate(_rms(y, a[f"{name}_norm"]["scale"], llm), position, llm.rope_theta)

    return project

  q, k, v = (_by_expert(is_gen, heads(und, n), heads(gen, n))(x) for n in "qkv")
  out = np.zeros_like(q)
  for head in range(llm.num_heads):
    source = head // (llm.num_heads // llm.num_kv_heads)
    scores = np.where(mask, q[:, head] @ k[:, source].T / np.sqrt(llm.head_dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, source]

  def finish(p):
    def apply(rows):
      rows = rows + np.einsum("tnh,nhd->td", out, p["attention"]["o"]["kernel"])
      y, mlp = _rms(rows, p["post_attention_norm"]["scale"], llm), p["mlp"]
      gate = y @ mlp["gate"]["kernel"]
      y = gate / (1 + np.exp(-gate)) * (y @ mlp["up"]["kernel"])
      return rows + y @ mlp["down"]["kernel"]

    return apply

  return _by_expert(is_gen, finish(und), finish(gen))(x)
