"""One of BAGEL's decoder blocks in PyTorch, to compare a device's rate with.

  python launch/torch_block.py '{"width": 3584, ...}' bfloat16 3

The arguments are a workload of the benchmark (`unigrpo_jax/tools/workloads.py`) as JSON, a dtype,
and how often it is timed; the seconds are printed as JSON. A script of its own, since the package
has nothing to do with PyTorch: `bench --device-check` runs it where PyTorch is installed.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import sys
import time
import types

import torch
from torch.nn import functional


class Block(torch.nn.Module):
  """Norms, projections with biases, q and k normed by head, attention, and the gated MLP."""

  def __init__(self, work: types.SimpleNamespace):
    super().__init__()
    self.heads, self.kv_heads, self.head_dim = work.heads, work.kv_heads, work.width // work.heads
    linear = lambda a, b, bias=False: torch.nn.Linear(a, b, bias=bias)
    kv = work.kv_heads * self.head_dim
    self.q, self.o = linear(work.width, work.width, True), linear(work.width, work.width)
    self.k, self.v = linear(work.width, kv, True), linear(work.width, kv, True)
    self.gate, self.up = linear(work.width, work.ffn), linear(work.width, work.ffn)
    self.down = linear(work.ffn, work.width)
    scale = lambda size: torch.nn.Parameter(torch.ones(size))
    self.norms = torch.nn.ParameterList([scale(work.width), scale(work.width)])
    self.head_norms = torch.nn.ParameterList([scale(self.head_dim), scale(self.head_dim)])

  def forward(self, x, angles, context):
    """x [B, T, D], angles [T, H / 2] of the rotation, context (k, v) [B, S, K, H] -> [B, T, D]."""
    h = _norm(x, self.norms[0])
    split = lambda a, heads: a.view(*a.shape[:2], heads, self.head_dim)
    q = _rotate(_norm(split(self.q(h), self.heads), self.head_norms[0]), angles)
    k = _rotate(_norm(split(self.k(h), self.kv_heads), self.head_norms[1]), angles)
    v = split(self.v(h), self.kv_heads)
    k, v = torch.cat([context[0], k], 1), torch.cat([context[1], v], 1)
    groups = self.heads // self.kv_heads
    k, v = (a.repeat_interleave(groups, 2) for a in (k, v))
    attended = functional.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
    x = x + self.o(attended.transpose(1, 2).reshape(x.shape))
    h = _norm(x, self.norms[1])
    return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def _norm(x, scale):
  wide = x.float()
  return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


def _rotate(x, angles):
  a, b = x.float().chunk(2, -1)
  cos, sin = angles.cos()[:, None], angles.sin()[:, None]
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def seconds(work: types.SimpleNamespace, dtype: str, repeats: int) -> dict[str, float]:
  """{"forward", "forward_backward"}: of an image's tokens over their context, `group` images.

  The block is that of the generation expert alone; medians, on the GPU where there is one.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = getattr(torch, dtype)
  block = Block(work).to(device, kind)
  draw = lambda *shape: torch.randn(*shape, device=device, dtype=kind)
  x = draw(work.group, work.latents + 2, work.width).requires_grad_()
  angles = torch.rand(work.latents + 2, work.width // work.heads // 2, device=device)
  before = work.system + work.prompt + work.tokens
  context = [draw(work.group, before, work.kv_heads, work.width // work.heads) for _ in range(2)]

  def forward():
    with torch.no_grad():
      block(x, angles, context)

  def forward_backward():
    block(x, angles, context).float().sum().backward()

  return {
    function.__name__: _median(function, repeats, torch.cuda.synchronize if device == "cuda" else
                               lambda: None)
    for function in (forward, forward_backward)
  }


def _median(function: Callable[[], None], repeats: int, wait: Callable[[], None]) -> float:
  taken = []
  for _ in range(repeats + 2):
    wait()
    start = time.perf_counter()
    function()
    wait()
    taken.append(time.perf_counter() - start)
  return sorted(taken[2:])[repeats // 2]


if __name__ == "__main__":
  workload, dtype, repeats = sys.argv[1:]
  print(json.dumps(seconds(types.SimpleNamespace(**json.loads(workload)), dtype, int(repeats))))
