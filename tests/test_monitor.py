"""Statistics of images by hand, and warnings where a reward that rises changes them."""

import json

import numpy as np
import pytest

from unigrpo_jax.benchmarks import monitor, statistics


def plain(color, side=8):
  return np.full((side, side, 3), color, np.uint8)


def test_statistics_of_an_image_by_hand():
  grey, red, white = plain((99, 99, 99)), plain((200, 100, 50)), plain((255, 255, 255))
  assert statistics.quick(grey) == {"saturation": 0, "sharpness": pytest.approx(0, abs=1e-6),
                                    "clipped": 0}
  assert statistics.quick(red)["saturation"] == pytest.approx(0.75)
  assert statistics.quick(white)["clipped"] == 1 and statistics.quick(0 * white)["saturation"] == 0
  chess = grey * (np.indices((8, 8)).sum(axis=0) % 2)[..., None].astype(np.uint8)
  # The Laplacian is 4 x 99/255 up and down; half the pixels are black.
  assert statistics.quick(chess)["sharpness"] == pytest.approx(4 * 99 / 255, rel=1e-5)
  assert statistics.quick(chess)["clipped"] == 0.5
  assert statistics.quick(grey[:1, :1])["sharpness"] == 0


def test_diversity_is_within_a_group():
  images = [plain(0), plain(255), plain(255, 8), plain(7), plain(7), plain(90, 64)]
  made = monitor.of_images(images, [3, 3, 3, 4, 4, 5])
  assert {name: values.dtype for name, values in made.items()} == dict.fromkeys(
    monitor.NAMES, np.float32
  )
  np.testing.assert_allclose(made["diversity"], [2 / 3] * 3 + [0, 0, np.nan], atol=1e-6)
  np.testing.assert_array_equal(made["clipped"], [1, 1, 1, 0, 0, 0])


def row(step, reward, saturation):
  return {"reward/mean": reward, "images/saturation": saturation + 0.01 * (step % 3)}


def run(watch, steps, reward, saturation):
  """What the iterations `steps` are told, with a reward and a statistic that move."""
  return [watch(row(step, reward(step), saturation(step)))["images/outside"] for step in steps]


def test_a_warning_where_the_reward_rises_and_the_images_change(tmp_path, capsys):
  log = tmp_path / "metrics.jsonl"
  rising, changing = lambda step: step / 40, lambda step: 0.3 + max(step - 20, 0) / 100
  outside = run(monitor.Watch(log), range(40), rising, changing)
  first = outside.index(1)
  assert 21 < first < 30 and outside == [0] * first + [1] * (40 - first)
  (line,) = capsys.readouterr().out.splitlines()
  assert "warning: images/saturation is" in line and "0.3 to 0.32 in the first 10" in line
  # Neither alone is a warning.
  assert not any(run(monitor.Watch(log), range(40), rising, lambda step: 0.3))
  assert not any(run(monitor.Watch(log), range(40), lambda step: 0.5, changing))
  assert not capsys.readouterr().out


def test_a_resumed_run_knows_its_first_iterations(tmp_path):
  log = tmp_path / "metrics.jsonl"
  rising, changing = lambda step: step / 40, lambda step: 0.3 + max(step - 20, 0) / 100
  whole = run(monitor.Watch(log), range(40), rising, changing)
  for stop in (4, 12, 30):
    rows = [{"step": step} | row(step, rising(step), changing(step)) for step in range(stop)]
    rows.insert(2, {"step": 1, "eval/think/reward": 0.5})
    log.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert run(monitor.Watch(log), range(stop, 40), rising, changing) == whole[stop:]


def test_nothing_is_watched_without_statistics(tmp_path):
  assert monitor.Watch(tmp_path / "metrics.jsonl")({"reward/mean": 0.5}) == {}
