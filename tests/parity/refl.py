"""Recorded gradients of differentiable rewards: ReFL, DRaFT-K and SRPO, on a toy network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tests.parity import cases
from unigrpo_jax.losses import refl as refl_losses
from unigrpo_jax.sampling import direct, flow

# Terms of the recorded float32 sums cancel: where a value is near 0, exact arithmetic is as far
# from it as elsewhere, by up to 8.2e-6 of the array's largest number (SRPO's image).
VALUE = cases.Tolerance(0.0, 1e-5, of_largest=True)
LOSS = cases.Tolerance(1e-9, 1e-5)
GRADIENT = cases.Tolerance(1e-9, 1e-5, of_norm=True)
# Of the FLUX autoencoder that SRPO decodes with: one latent token is 2 x 2 of its latents.
SCALE, SHIFT, PATCH = 0.3611, 0.1159, 2
SRPO_MARGIN, GROUNDTRUTH_RATIO = 0.7, 0.9


def read(rec, case, *names):
  """The arrays `names` of a recorded case, its network and its reward."""
  network = {f"net/{name}": rec[f"{case}/net/{name}"] for name in ("w1", "b1", "c1", "w2")}
  head = {f"head/{name}": rec[f"{case}/head/{name}"] for name in ("dec", "q", "gain", "offset")}
  return network | head | {name: rec[f"{case}/{name}"] for name in names}


def velocity(a, params=None):
  """(x [B, I, C], t) -> [B, I, C], with `params` in place of the recorded ones."""
  p = params or network(a)
  return lambda x, t: jnp.tanh(x @ p["w1"] + t * p["b1"] + p["c1"]) @ p["w2"]


def network(a):
  return {name: a[f"net/{name}"] for name in ("w1", "b1", "c1", "w2")}


def picture(a, x_0):
  """[B, I, C] -> [B, I, P]."""
  return jnp.clip(x_0 @ a["head/dec"] / 2 + 0.5, 0, 1)


def score(a, image):
  inner = jnp.mean(image * a["head/q"], axis=(1, 2))
  return a["head/gain"] * jnp.tanh(4 * inner) + a["head/offset"]


def loss_of_image(a, x_0, scale, margin):
  """(scale * mean relu(margin - R), R)."""
  rewards, _ = refl_losses.reward_with_gradient(lambda x_0: score(a, picture(a, x_0)), x_0)
  weights = jnp.full(len(x_0), scale / len(x_0))
  loss, signals = refl_losses.reward_loss(rewards, weights, margin=margin)
  return loss, signals["reward"]


def compare(rec, case, values, gradients=(), name="dloss"):
  for key, value in values.items():
    rec.check("values", f"{case}/{key}", value, VALUE)
  for key, value in dict(gradients).items():
    rec.check("gradients", f"{case}/{name}_d{key}", value, GRADIENT)


@cases.case("refl")
def late_step(folder, rec):
  names = ("x_init", "schedule", "mid", "margin", "grad_scale")
  for m in rec.matches(r"(.+)/x_init"):
    a = read(rec, m[1], *names)
    low, high = direct.late_range(len(a["schedule"]) - 1)
    rec.check_equal("range", f"{m[1]}/mid", low <= a["mid"] < high, True, cases.EXACT)
    values, gradients, by_image, by_velocity = _late_step(a)
    rec.check("loss", f"{m[1]}/loss", values.pop("loss"), LOSS)
    compare(rec, m[1], values, gradients)
    compare(rec, m[1], {}, {"x0": by_image, "v": by_velocity})
    rec.check_equal(
      "by time", f"{m[1]}/dloss_dv", by_velocity, -values["t"] * by_image, cases.EXACT
    )


@jax.jit
def _late_step(a):
  rows = len(a["x_init"])
  steps = jnp.full((rows, 1), a["mid"], jnp.int32)
  drawn = flow.integrate_recording(velocity(a), a["x_init"], a["schedule"], steps)
  x_t, t = drawn.x_t[:, 0], drawn.t[:, 0]

  def loss_of(v):
    return loss_of_image(a, direct.predict(x_t, v, t), a["grad_scale"], a["margin"])[0]

  v = velocity(a)(x_t, t[0])
  x_0 = direct.predict(x_t, v, t)
  loss, rewards = loss_of_image(a, x_0, a["grad_scale"], a["margin"])
  values = dict(x_t=x_t, t=t[0], v=v, x0=x_0, image=picture(a, x_0), reward=rewards, loss=loss)
  by_image = jax.grad(lambda x_0: loss_of_image(a, x_0, a["grad_scale"], a["margin"])[0])(x_0)
  gradients = jax.grad(lambda params: loss_of(velocity(a, params)(x_t, t[0])))(network(a))
  return values, gradients, by_image, jax.grad(loss_of)(v)


@cases.case("draft")
def last_steps(folder, rec):
  for m in rec.matches(r"(.+)/k(\d+)/x0"):
    values, gradients = _last_steps(read(rec, m[1], "x_init", "schedule"), int(m[2]))
    # A mean of rewards of either sign: as exact as they are.
    exact = VALUE.relative * float(jnp.abs(values["reward"]).max())
    rec.check("loss", f"{m[1]}/k{m[2]}/loss", values.pop("loss"), cases.Tolerance(exact, 0.0))
    compare(rec, f"{m[1]}/k{m[2]}", values, gradients)


@functools.partial(jax.jit, static_argnums=1)
def _last_steps(a, gradient_steps):
  first = direct.first_differentiated(len(a["schedule"]) - 1, gradient_steps)

  def image(params):
    x_t = flow.integrate(velocity(a, params), a["x_init"], a["schedule"][: first + 1])
    return direct.finish(velocity(a, params), x_t, a["schedule"][first:])

  x_0 = image(network(a))
  rewards = score(a, picture(a, x_0))
  # The recorded loss has no margin: one above all rewards acts on none of them.
  loss_fn = lambda params: loss_of_image(a, image(params), 1.0, rewards.max() + 1)[0]
  values = dict(x0=x_0, image=picture(a, x_0), reward=rewards)
  values["loss"] = loss_fn(network(a)) - (rewards.max() + 1)
  return values, jax.grad(loss_fn)(network(a))


@cases.case("srpo")
def direct_alignment(folder, rec):
  for m in rec.matches(r"(.+)/clean"):
    a = read(rec, m[1], "clean", "noise", "sigmas")
    length, middle = len(a["sigmas"]), rec.number(f"{m[1]}/mid")
    size = min(int((1 - GROUNDTRUTH_RATIO) * length) + 1, length - middle, middle)
    ends = {"denoise": middle + size, "inversion": middle - size}
    branches = {}
    for branch in (m[1] for m in rec.matches(rf"{m[1]}/(\w+)/x_t")):
      t, t_next = (a["sigmas"][length - at] for at in (ends[branch], middle))
      branches[branch] = dict(t=t, t_next=t_next, k=rec[f"{m[1]}/{branch}/k"])
      shape = tuple(side // PATCH for side in rec[f"{m[1]}/{branch}/image"].shape[-2:])
    values, gradients = _direct_alignment(a, branches, shape)
    for branch, of_branch in values.items():
      # Two rewards of the size of the gain, of which one is taken from the other.
      exact = VALUE.relative * float(2 * (1 + branches[branch]["k"].max()) * a["head/gain"])
      score = values[branch]["score"]
      rec.check("scores", f"{m[1]}/{branch}/score", score, cases.Tolerance(exact, 0.0))
      compare(rec, f"{m[1]}/{branch}",
              {key: value for key, value in of_branch.items() if key != "score"})
    # The loss that is left is that of the last branch.
    scores = values[[*branches][-1]]["score"]
    loss = jax.nn.relu(SRPO_MARGIN - scores).mean() / len(branches)
    compare(rec, m[1], {"loss_last": loss}, gradients, "dtotal")


@functools.partial(jax.jit, static_argnames="shape")
def _direct_alignment(a, branches, shape):
  clean, rows, (height, width) = a["clean"], len(a["clean"]), shape  # in latent tokens

  def run(params, t, t_next, k):
    t, t_next = (jnp.full(rows, time) for time in (t, t_next))
    x_t = direct.noised(clean, a["noise"], t)
    seen = jnp.trunc(1000 * t) / 1000  # what the network is told
    v = velocity(a, params)(x_t, seen[:, None, None])
    x_0 = direct.align(x_t, v, a["noise"], t, t_next)
    # [B, h w, (C, py, px)] -> [B, (h py w px), C]
    x_0 = x_0.reshape(rows, height, width, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    image = picture(a, x_0.reshape(rows, height * width * PATCH**2, -1) / SCALE + SHIFT)
    # (1 + k) times that of the wanted words, less that of the others: of the negative, here.
    scores = (1 + k) * score(a, image) - score(a, 1 - image)
    square = image.reshape(rows, height * PATCH, width * PATCH, -1)
    return dict(x_t=x_t, t_model=seen, v=v, image=jnp.moveaxis(square, -1, 1), score=scores)

  def total(params):
    weights = jnp.full(rows, 1 / rows / len(branches))
    losses = (
      refl_losses.reward_loss(run(params, **times)["score"], weights, margin=SRPO_MARGIN)[0]
      for times in branches.values()
    )
    return sum(losses)

  values = {branch: run(network(a), **times) for branch, times in branches.items()}
  return values, jax.grad(total)(network(a))
