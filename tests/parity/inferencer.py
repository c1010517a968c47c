"""The official inferencer, call by call: thinking, editing and understanding.

Two rows replay its two growing contexts: row 0 the main one, row 1 the one without images (image
CFG). The context without the last text (text CFG) is the main one as of an earlier moment.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import PIL.Image

from tests.parity import cases, network, tables, text, vision
from tests.parity import flow as flow_cases
from unigrpo_jax import errors, types
from unigrpo_jax.data import images
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import programs
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.sampling import flow

# Arguments that a recording leaves out have the official inferencer's defaults.
DEFAULTS = dict(
  think=False, understanding_output=False, cfg_text_scale=3.0, cfg_img_scale=1.5,
  cfg_interval=[0.4, 1.0], cfg_renorm_type="global", cfg_renorm_min=0.0, num_timesteps=50,
  timestep_shift=3.0, max_think_token_n=1000, image_shapes=[1024, 1024],
)
MAIN, NO_IMAGE = 0, 1


class Replay:
  """The contexts of a recording so far, and what it was asked to do.

  Attributes:
    settings: arguments of the official call.
    context: rows MAIN and NO_IMAGE.
    before_text: moment of the text-CFG context.
    size: (H, W) pixels of the image to come.
    thought: ids of the generated text, once there is one.
    shared: segments of what was read so far, of the texts and images below by name.
    inputs: of `programs.prefill`.
  """

  def __init__(self, folder: network.Folder, rec: cases.Recording):
    self.net, self.folder, self.rec = folder.network, folder, rec
    self.settings = DEFAULTS | json.loads(str(rec["aux_settings"]))
    positions = [rec[m[0]] for m in rec.matches(r"call\d+_\w+_(pos|tokens)")]
    tokens = sum(len(p) + network.TEXT_MULTIPLE for p in positions)
    self.context = self.net.empty(2, tokens)
    self.before_text = self.context.mark()
    self.size = self.settings["image_shapes"]
    self.pictures = [PIL.Image.fromarray(rec[m[0]]) for m in rec.matches(r"in_pil_image\w*")]
    self.picture = 0  # Which of them comes next.
    self.thinks = self.settings["think"]
    self.thought = None
    self.shared: list[script_lib.Segment] = []
    self.inputs = programs.Inputs(texts={}, images={})

  def run(self) -> None:
    call = 0
    while any(self.rec.matches(rf"call{call}_\w+")):
      kinds = {"text_ids": self.texts, "vae_image": self.clean_image, "vit_tokens": self.patches,
               "gen_tokens": self.generate}
      kind = next((k for k in kinds if f"call{call}_{k}" in self.rec), None)
      if kind is None:
        raise cases.NotCovered(f"call {call} is none of {', '.join(kinds)}")
      call += kinds[kind](call)

  def check_before(self, call: int, pos_key: str, row: int, positions: np.ndarray) -> None:
    """Where a call begins: cached length, and RoPE ids."""
    lengths = (np.asarray(self.context.order[row]) != types.UNSEEN).sum(keepdims=True)
    self.rec.check("calls", f"call{call}_kv_len_before", lengths, cases.EXACT)
    self.rec.check("calls", f"call{call}_{pos_key}", positions, cases.EXACT)

  def texts(self, call: int) -> int:
    """A text: two calls, for either context; a thought only for the main one."""
    ids = self.rec[f"call{call}_text_ids"]
    name = script_lib.PROMPT
    if self.thought is not None:
      expected, name = self.wrapped(self.thought), script_lib.REASONING
    elif self.thinks and call == 0:
      prompt = (tokenizer_lib.SYSTEM_PROMPT_VLM if self.settings["understanding_output"]
                else tokenizer_lib.SYSTEM_PROMPT_GEN)
      expected, name = self.wrapped(self.folder.tokenizer.encode_text(prompt)), script_lib.SYSTEM
    else:
      expected = ids
      self.before_text = self.context.mark()
      self.rename_prompt(f"text before call {call}")
    self.inputs.texts[name] = types.Text(ids[None], np.ones((1, len(ids)), bool))
    self.shared.append(script_lib.Given(name))
    where = [MAIN] if self.thought is not None else [MAIN, NO_IMAGE]
    for offset, row in enumerate(where):
      positions = int(self.context.position[row]) + np.arange(len(ids))
      self.check_before(call + offset, "text_pos", row, positions)
      self.rec.check("texts", f"call{call + offset}_text_ids", expected, cases.EXACT)
    rows = [ids if row in where else ids[:0] for row in (MAIN, NO_IMAGE)]
    self.context, _ = self.net.append_text(self.context, rows)
    return len(where)

  def rename_prompt(self, name: str) -> None:
    """Of several texts only the last is the prompt."""
    prompt = script_lib.Given(script_lib.PROMPT)
    if prompt in self.shared:
      self.shared[self.shared.index(prompt)] = script_lib.Given(name)
      self.inputs.texts[name] = self.inputs.texts.pop(script_lib.PROMPT)

  def saw(self, **parts) -> None:
    """Adds latents with their grid, or patches, of the picture that is being read."""
    name = f"picture {self.picture}"
    picture = self.inputs.images.get(name, types.Seen()).replace(**parts)
    self.inputs.images[name] = picture
    if self.shared and self.shared[-1].name == name:
      self.shared.pop()
    self.shared.append(script_lib.Seen(
      name, latents=picture.latents is not None, patches=picture.patches is not None
    ))

  def wrapped(self, ids) -> np.ndarray:
    special = self.folder.special_ids
    return np.array([special["bos_token_id"], *ids, special["eos_token_id"]])

  def resized(self) -> PIL.Image.Image:
    """The picture as the VAE sees it; the ViT's is resized from this one."""
    if self.picture >= len(self.pictures):
      raise cases.NotCovered("the file has no in_pil_image for this call")
    picture = images.to_rgb(self.pictures[self.picture])
    return tables.resize(picture, self.net.config.vae_image)

  def clean_image(self, call: int) -> int:
    picture = self.resized()
    self.size = picture.size[::-1]
    # The official transform resizes once more, which changes nothing but under odd rules.
    picture = tables.resize(picture, self.net.config.vae_image)
    picture = np.moveaxis(images.to_array(picture), -1, 0)[None]
    self.rec.check("transforms", f"call{call}_vae_image", picture, cases.EXACT)
    latents = self.net.latents(*self.net.encode_image(picture), self.rec[f"call{call}_vae_noise"])
    tokens = flow_cases.pack_tokens(self.net, latents)[0]
    grid = self.net.latent_grid([picture.shape[-2:]])
    self.check_before(call, "vae_pos", MAIN,
                      np.full(len(tokens) + 2, self.context.position[MAIN]))
    self.saw(latents=tokens[None], grid=grid)
    padded, mask = network.pad([tokens, tokens[:0]], len(tokens))
    grid = types.LatentGrid(np.repeat(grid.ids, 2, axis=0), mask)
    self.context = self.net.apply("append_latents", self.context, padded, grid)
    self.before_text = self.context.mark()
    return 1

  def patches(self, call: int) -> int:
    picture = self.resized()
    self.size = picture.size[::-1]
    picture = images.to_array(tables.resize(picture, self.net.config.vit_image))
    patches = vision.patches_of(self.net, [np.moveaxis(picture, -1, 0), None])
    self.rec.check("transforms", f"call{call}_vit_tokens", patches.pixels[0], cases.EXACT)
    self.rec.check("transforms", f"call{call}_vit_position_ids", patches.ids[0], cases.EXACT)
    self.check_before(call, "vit_pos", MAIN,
                      np.full(patches.ids.shape[1] + 2, self.context.position[MAIN]))
    self.saw(patches=jax.tree.map(lambda rows: rows[: MAIN + 1], patches))
    self.context = self.net.apply("append_patches", self.context, patches)
    self.before_text = self.context.mark()
    self.picture += 1
    return 1

  def generate(self, call: int) -> int:
    """Text from a copy of the main context."""
    main = network.rows(self.context, MAIN, MAIN + 1)
    self.rec.check("calls", f"call{call}_gen_start_pos", main.position, cases.EXACT)
    recorded = self.rec[f"call{call}_gen_tokens"]
    start, end = (self.folder.special_ids[key] for key in ("bos_token_id", "eos_token_id"))
    tokens = text.greedy(self.net, main, start, self.settings["max_think_token_n"], end)[0]
    self.rec.check("generated", f"call{call}_gen_tokens", tokens, cases.EXACT)
    logits = text.forced(self.net, main, [recorded])[0]
    self.rec.check("generated_logits", f"call{call}_gen_step_logits", logits, cases.MODEL)
    self.thought = self.encoded_again(tokens[1:], start)
    self.rec.check("generated", "out_text_ids", self.thought, cases.EXACT)
    return 1

  def encoded_again(self, ids: np.ndarray, start: int) -> np.ndarray:
    """What goes back into the context: decoded, cut at the next start token, and encoded again."""
    # By the id: the name of the start token stands for nothing else.
    ids = ids[: np.argmax([*(ids == start), True])]
    again = self.round_trip(ids)
    if again is not None:
      return np.array(again, np.int32)
    # Some id has no character by the toy tokenizer's rule, which does not say what becomes of it.
    recorded = self.rec.get("out_text_ids", ids)
    ours, theirs = ([i for i in row.tolist() if self.round_trip([i])] for row in (ids, recorded))
    self.rec.check_equal("generated", "out_text_ids with characters", ours, theirs, cases.EXACT)
    return recorded

  def round_trip(self, ids) -> list[int] | None:
    """Ids decoded and encoded; None where one of them has no character."""
    tokenizer = self.folder.tokenizer
    try:
      # Not `encode`: NFC belongs to the released tokenizer, which applies it by itself.
      return tokenizer.encode_text(tokenizer.decode(ids))
    except errors.InputError:
      return None


@cases.case("h_think_t2i", "i_edit", "i2_edit_think_global", "i3_understand_think")
def replay(folder, rec):
  calls = Replay(folder, rec)
  calls.run()
  if "in_init_noise" in rec:
    generate_image(calls, rec)


def generate_image(calls: Replay, rec: cases.Recording) -> None:
  net, settings = calls.net, calls.settings
  main = network.rows(calls.context, MAIN, MAIN + 1)
  earlier = calls.before_text.replace(position=calls.before_text.position[MAIN : MAIN + 1])
  contexts = main, main.as_of(earlier), network.rows(calls.context, NO_IMAGE, NO_IMAGE + 1)
  pack = flow_cases.Pack(net, [calls.size])
  query = int(pack.lengths[0]) + 2
  lengths = []
  for name, context in zip(("main", "cfg_text", "cfg_img"), contexts):
    rec.check("contexts", f"out_{name}_position_ids", np.full(query, context.position[0]),
              cases.EXACT)
    network.check_cache(rec, "cache", context, f"{name}_")
    lengths.append(network.cached(context, 0)[2][0])
  rec.check("contexts", "out_kv_lens", lengths, cases.EXACT)

  times = flow.time_grid(settings["num_timesteps"], settings["timestep_shift"])
  guidance = flow_cases.guidance_from(settings)
  flow_cases.check_steps(rec, times)
  flow_cases.check_active(rec, "active", "out_cfg_active", guidance, times[:-1])
  xs, vs = net.integrate(contexts, pack.rows(rec["in_init_noise"]), pack.grid, times, guidance)
  rec.check("loop", "out_x", pack.packed(xs), cases.LOOP)
  rec.check("loop", "out_v", pack.packed(vs), cases.LOOP)
  rec.check("image", "out_image_uint8", net.picture(xs[-1, 0], *pack.sizes[0]), cases.PIXELS)

  # And by the programs that `generate` and training run.
  script = script_lib.Script(shared=tuple(calls.shared), own=(script_lib.Drawn(),))
  capacity = sum(rec[m[0]].size + 2 for m in rec.matches(r"call\d+_(text_ids|\w+_pos)"))
  params = net.params["bagel"]
  read = programs.prefill(net.model, params, calls.inputs, script=script, capacity=capacity)
  x = programs.denoise(
    net.model, params, read, pack.rows(rec["in_init_noise"]), pack.grid,
    num_timesteps=settings["num_timesteps"], shift=settings["timestep_shift"], guidance=guidance,
  ).latents
  rec.check_equal("programs", "the last of out_x", pack.packed(x), rec["out_x"][-1], cases.LOOP)
