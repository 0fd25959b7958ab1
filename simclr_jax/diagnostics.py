"""What the numbers of a run say: one line a step, advice once, what broke.

Runs on the host, on metrics that have been read; nothing here slows a step.
"""

import math
import re
from collections.abc import Sequence

import jax

from simclr_jax import metrics
from simclr_jax.train_state import group_of

# Dense bfloat16 (float16 where there is none) per JAX device, in TFLOP/s, from
# the makers' data sheets; a device's name has the key as words in it. JAX sees
# two devices on a chip of TPU v2, v3 and 7x.
PEAK_TFLOPS = {
  "TPU v2": 22.5,
  "TPU v3": 61.5,
  "TPU v4": 275,
  "TPU v5 lite": 197,
  "TPU v5": 459,
  "TPU v5p": 459,
  "TPU v6": 918,
  "TPU7x": 1153.5,
  "V100": 125,
  "T4": 65,
  "A100": 312,
  "L4": 121,
  "L40S": 362,
  "H100": 989,
  "H200": 989,
  "GH200": 989,
  "B200": 2250,
  "GB200": 2500,
}


def peak_tflops(device_kind: str) -> float | None:
  """What one device of this kind can do at most, or None if not known.

  >>> peak_tflops("NVIDIA A100-SXM4-40GB")
  312
  """
  found = [k for k in PEAK_TFLOPS if re.search(rf"\b{k}\b", device_kind)]
  return PEAK_TFLOPS[max(found, key=len)] if found else None


def device_memory_gib() -> float | None:
  """Most memory (GiB) ever in use on this host's first device, if told.

  >>> memory = device_memory_gib()  # None on a CPU
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return round(peak / 2**30, 3) if peak else None


def not_finite(values: dict, names: Sequence[str]) -> str:
  """Says what is not finite in a step's metrics, "" where all is well.

  Args:
    values: the metrics; "grad_norms", "update_norms" and "param_norms" are
      [tensors].
    names: of the tensors. Those of a classifier beside pretraining are not
      looked at: whatever becomes of it, the network goes on.

  >>> values = {"loss": 5.0, "grad_norms": [1.0, math.nan]}
  >>> not_finite(values, ["encoder/stem/conv_1/kernel", "classifier/bias"])
  'the gradient of classifier/bias is not finite'
  """
  if not math.isfinite(values["loss"]):
    where = "although every parameter and gradient before it was finite"
    return f"the loss is {values['loss']}, {where}"
  for kind in ("grad", "update", "param"):
    norms = values.get(f"{kind}_norms", ())
    for name, norm in zip(names, norms, strict=False):
      beside = "probe_loss" in values and group_of(name) == "classifier"
      if not math.isfinite(norm) and not beside:
        what = {"grad": "gradient", "update": "update", "param": "value"}[kind]
        return f"the {what} of {name} is not finite"
  return ""


def summarize(values: dict, names: Sequence[str]) -> dict[str, float]:
  """A step's metrics as floats for metrics.jsonl.

  Norms of tensors become norms of the network's parts ("grad_norm/stem", ...),
  moments of the embeddings their effective rank and standard deviation, the
  Gaussian potential its logarithm, the uniformity.

  Args:
    values: scalars and arrays of one step.
    names: of the tensors that the norms are of.

  >>> names = ["encoder/stem/conv_1/kernel", "encoder/stem/bn_1/scale"]
  >>> summarize({"loss": 5, "grad_norms": [3, 4]}, names)
  {'loss': 5.0, 'grad_norm/stem': 5.0}
  """
  values = dict(values)
  floats = {}
  if "embedding_moment" in values:
    floats |= metrics.from_moments(
      values.pop("embedding_mean"), values.pop("embedding_moment")
    )
  if "gaussian_potential" in values:
    potential = float(values.pop("gaussian_potential"))
    floats["uniformity"] = math.log(max(potential, 1e-300))
  for kind in ("grad", "update", "param"):
    squares: dict[str, float] = {}
    norms = values.pop(f"{kind}_norms", ())
    for name, norm in zip(names, norms, strict=False):
      group = group_of(name)
      squares[group] = squares.get(group, 0.0) + float(norm) ** 2
    floats |= {f"{kind}_norm/{k}": math.sqrt(v) for k, v in squares.items()}
  return {k: float(v) for k, v in values.items()} | floats


class Advice:
  """Says once, in words, what a run's numbers mean and what to try.

  Example:
    >>> advice = Advice(num_pairs=64, temperature=0.05)
    >>> len(advice(1, {"loss": 9.0}))
    1
  """

  def __init__(
    self, *, num_pairs: int = 0, temperature: float = 1.0, warmup_steps: int = 0
  ):
    """`num_pairs` is that of the global batch; 0: no contrastive loss."""
    self._num_pairs, self._temperature = num_pairs, temperature
    self._warmup_steps = warmup_steps
    self._in_a_row: dict[str, int] = {}
    self._said: set[str] = set()

  def __call__(self, step: int, values: dict) -> list[str]:
    """Looks at one line of metrics.jsonl; returns what is to be said now."""
    found = self._contrastive(step, values) if self._num_pairs else {}
    wait = values.get("input_wait") or 0.0
    found["input"] = (
      wait > 0.2,
      3,
      f"{wait:.0%} of the time goes into waiting for images: the host is the "
      "limit. `python -m simclr_jax.datasets check` measures it; more cores, "
      "`datasets pack`, the extra `fast` or more memory (data.memory_gib) help",
    )
    said = []
    for name, (holds, times, text) in found.items():
      self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if holds else 0
      if self._in_a_row[name] >= times and name not in self._said:
        self._said.add(name)
        said.append(text)
    return said

  def _contrastive(self, step: int, values: dict) -> dict:
    """name -> (whether it holds now, how often in a row it must, text)."""
    n, t = self._num_pairs, self._temperature
    uniform = metrics.uniform_loss(n)
    # The loss where views agree and all others are orthogonal to them: little
    # is left to learn then.
    rest = 2 * math.log1p((2 * n - 2) * math.exp(-1 / t))
    higher = 1 / math.log((2 * n - 2) / 0.1) if n > 1 else 1.0
    rank = values.get("effective_rank", math.inf)
    return {
      "batch": (
        rest < 0.1,
        1,
        f"a batch of {n} is small for temperature {t:g}: negatives that are "
        f"merely orthogonal already give a loss of {rest:.2g}, so that little "
        f"is left to learn from. Take a temperature of {higher:.2g} or more, "
        "or a larger batch",
      ),
      "uniform": (
        step > self._warmup_steps and values["loss"] > 0.98 * uniform,
        3,
        f"the loss is still that of embeddings that say nothing "
        f"({uniform:.4g}) after the warm-up. Likely causes: a learning rate "
        "that is far too low or too high, augmentation that leaves nothing in "
        "common (augment.strength, augment.area_range), images that are all "
        "alike or not decoded as you think (look at the views)",
      ),
      "collapsed": (
        rank < 1.5,
        1,
        f"the embeddings have collapsed: effective rank {rank:.2f}, they lie "
        "on one line. Likely causes: a learning rate that is too high, a "
        "warm-up that is too short, a batch of images that are all alike",
      ),
    }
