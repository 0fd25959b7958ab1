"""Deterministic weights and inputs: pure functions of a name.

The golden files hold outputs only; what went in is drawn again from the CRC of
each array's name, as golden/README.md of the reference data describes.
"""

import json
import zlib

import numpy as np


def array(name, shape, kind, dtype=np.float32):
  """An array for `name`; drawn in float64, rounded to float32, then cast."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if kind == "uniform":
    x = rng.random(shape)
  elif kind == "blocks":  # 8x8 cells of one value each
    cells = rng.random((*shape[:-3], -(-shape[-3] // 8), -(-shape[-2] // 8), 3))
    x = cells.repeat(8, -3).repeat(8, -2)[..., : shape[-3], : shape[-2], :]
  elif kind == "moving_variance":
    x = 0.5 + rng.random(shape)
  else:
    x = rng.standard_normal(shape)
    if kind == "kernel":
      x *= np.sqrt(2 / np.prod(shape[:-1]))
    elif kind in ("gamma", "gamma_small"):
      x = (1 if kind == "gamma" else 0.2) * (1 + 0.1 * x)
    elif kind in ("bias", "beta", "moving_mean"):
      x = 0.1 * x
    else:
      raise ValueError(kind)
  return x.astype(np.float32).astype(dtype)


def weights(names_file, *, tame=False, dtype=np.float32):
  """TF1 name -> array for a list of names; `tame` shrinks the last gammas."""
  listed = json.loads(names_file.read_text())
  small = set(listed["zero_init_gamma"]) if tame else set()
  return {
    name: array(
      name,
      shape,
      "gamma_small" if name in small else name.rsplit("/", 1)[1],
      dtype,
    )
    for name, shape, _ in listed["variables"]
  }


def variables(shapes):
  """Lively values for a tree of shapes: no gamma is 0, no variance is."""

  def draw(path, leaf):
    kinds = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
    names = [key.key for key in path]
    kind = kinds.get(names[-1], names[-1])
    return array("/".join(names), leaf.shape, kind, leaf.dtype)

  import jax

  return jax.tree_util.tree_map_with_path(draw, shapes)
