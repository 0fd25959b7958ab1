"""Checks the devices and hosts at hand before hours are spent on them.

  python -m simclr_jax.selftest

Start it as a training run would be started, on every host. It takes less than a
minute, prints a table and exits with 1 where something is not as it must be:
order of gathering, NT-Xent's gradient, BatchNorm's moments, views and slices of
data, each over all devices and against NumPy.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import augment, cli, data, hosts, layers, losses, parallel

_ROWS = 4  # a device
_FEATURES = 16


def _global_rows(shape, *, seed: int):
  """The same numbers on every host: (all rows, this host's rows)."""
  num = _ROWS * jax.device_count()
  rows = np.random.default_rng(seed).normal(size=(num, *shape))
  # Each device's rows lie elsewhere, so that a local result shows.
  rows += np.arange(num).reshape(-1, *[1] * len(shape)) / num
  return rows, rows[_of_this_host()]


def _of_this_host() -> slice:
  num = _ROWS * jax.local_device_count()
  return slice(jax.process_index() * num, (jax.process_index() + 1) * num)


def _all_devices(fn, *args):
  """Maps `fn` over all devices; returns what this host's first one has."""
  return parallel.unreplicate(parallel.pmap(fn)(*args))


def _error(got, expected) -> float:
  """Largest difference, relative to the largest value expected."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def gathering() -> float:
  """Gathered rows, and their positions, are in the order of the hosts."""
  rows, local = _global_rows((3,), seed=0)
  rows, local = rows.astype(np.float32), local.astype(np.float32)

  def fn(x):
    index = parallel.global_index(x.shape[0])
    return jax.lax.all_gather((x, index), parallel.AXIS, tiled=True)

  gathered, index = _all_devices(fn, parallel.shard(local))
  return max(_error(gathered, rows), _error(index, np.arange(len(rows))))


def reduction() -> float:
  """A mean over devices counts each device once."""
  index = _all_devices(
    lambda x: jax.lax.pmean(
      jax.lax.axis_index(parallel.AXIS) + x, parallel.AXIS
    ),
    parallel.replicate(np.float32(1)),
  )
  return _error(index, (jax.device_count() + 1) / 2)


def gradient() -> float:
  """The gradient of NT-Xent through two projections, with global negatives."""
  x, local = _global_rows((2, _FEATURES), seed=1)
  weights = np.random.default_rng(2).normal(size=(_FEATURES, 8))

  def fn(weights, x):
    def loss_fn(weights):
      z = jnp.matmul(x, weights, precision="highest")
      return losses.nt_xent(
        z[:, 0], z[:, 1], temperature=0.2, axis_name=parallel.AXIS
      )[0]

    return jax.lax.pmean(jax.value_and_grad(loss_fn)(weights), parallel.AXIS)

  got = _all_devices(
    fn,
    parallel.replicate(weights.astype(np.float32)),
    parallel.shard(local.astype(np.float32)),
  )
  expected = _numpy_nt_xent(x, weights, temperature=0.2)
  return max(map(_error, got, expected))


def _numpy_nt_xent(x, weights, *, temperature: float):
  """Loss and gradient from the paper (2002.05709, eq. 1), in float64."""
  num = len(x)
  x = np.concatenate([x[:, 0], x[:, 1]])
  z = x @ weights
  norm = np.linalg.norm(z, axis=1, keepdims=True)
  u = z / norm
  logits = u @ u.T / temperature
  np.fill_diagonal(logits, -np.inf)
  logits -= logits.max(axis=1, keepdims=True)
  softmax = np.exp(logits)
  softmax /= softmax.sum(axis=1, keepdims=True)
  rows, other = np.arange(2 * num), (np.arange(2 * num) + num) % (2 * num)
  loss = -np.log(softmax[rows, other]).sum() / num
  softmax[rows, other] -= 1
  to_u = (softmax + softmax.T) @ u / temperature / num
  to_z = (to_u - u * (u * to_u).sum(axis=1, keepdims=True)) / norm
  return loss, x.T @ to_z


def batch_norm() -> float:
  """BatchNorm's output and moving averages over the global batch."""
  x, local = _global_rows((_FEATURES,), seed=3)
  zeros = np.zeros(_FEATURES, np.float32)
  variables = {
    "params": {"scale": zeros + 1, "bias": zeros},
    "batch_stats": {"mean": zeros, "var": zeros + 1},
  }

  def fn(variables, x):
    module = layers.batch_norm(
      train=True, dtype=jnp.float32, axis_name=parallel.AXIS
    )()
    y, updated = module.apply(variables, x, mutable=["batch_stats"])
    return jax.lax.all_gather(y, parallel.AXIS, tiled=True), updated

  y, updated = _all_devices(
    fn, parallel.replicate(variables), parallel.shard(local.astype(np.float32))
  )
  mean, variance = x.mean(axis=0), x.var(axis=0)
  moving = updated["batch_stats"]
  return max(
    _error(y, (x - mean) / np.sqrt(variance + 1e-5)),
    _error(moving["mean"], 0.1 * mean),
    _error(moving["var"], 0.9 + 0.1 * variance),
  )


def _numbered_images(num: int) -> data.Dataset:
  """Image i has label i and its own pixels."""
  rng = np.random.default_rng(4)
  return data.Dataset(
    rng.integers(0, 256, (num, 16, 16, 3), np.uint8),
    np.full((num, 2), 16, np.int32),
    np.arange(num, dtype=np.int32),
    ("class",),
  )


def _hosts() -> dict:
  return dict(
    process_index=jax.process_index(), process_count=jax.process_count()
  )


def slices() -> float:
  """Hosts and devices together hold each global batch, and each once."""
  batch_size = _ROWS * jax.device_count()
  dataset = _numbered_images(2 * batch_size + 3)

  def fn(x):
    return jax.lax.all_gather(x, parallel.AXIS, tiled=True)

  def labels(batches):
    return [
      _all_devices(fn, parallel.shard(batch["label"])) for batch in batches
    ]

  got = labels(
    data.train_batches(
      dataset,
      seed=5,
      batch_size=batch_size,
      start_step=1,
      num_steps=4,
      **_hosts(),
    )
  )
  expected = [
    data.batch_indices(
      seed=5, step=step, batch_size=batch_size, num_examples=len(dataset)
    )
    for step in (1, 2, 3)
  ]
  evaluated = np.concatenate(
    labels(data.eval_batches(dataset, batch_size=batch_size, **_hosts()))
  )[: len(dataset)]
  return max(_error(got, expected), _error(evaluated, dataset.labels))


def views() -> float:
  """Random views of an image do not depend on the device that makes them."""
  num = _ROWS * jax.device_count()
  images = _numbered_images(num).images
  key = jax.random.key(6)

  def fn(key, images):
    made = augment.two_views(
      key, images, index=parallel.global_index(images.shape[0]), size=12
    )
    return jax.lax.all_gather(
      made.reshape(2, *images.shape[:1], -1), parallel.AXIS, axis=1, tiled=True
    )

  got = _all_devices(
    fn, parallel.replicate(key), parallel.shard(images[_of_this_host()])
  )
  expected = jax.jit(lambda *args: augment.two_views(*args, size=12))(
    key, images
  )
  return _error(got.reshape(expected.shape), expected)


# Each with the largest error allowed: accelerators multiply with fewer bits.
CHECKS = {
  "gathering order": (gathering, 0.0),
  "mean over devices": (reduction, 1e-6),
  "NT-Xent, gradient": (gradient, 5e-3),
  "BatchNorm moments": (batch_norm, 1e-3),
  "data slices": (slices, 0.0),
  "views of images": (views, 1e-2),
}


def main() -> int:
  """Runs all checks, prints a table on host 0, returns the exit code."""
  begin = time.perf_counter()
  host0 = jax.process_index() == 0
  failed = 0
  if host0:
    print(
      f"{jax.device_count()} x {jax.devices()[0].device_kind} of "
      f"{jax.process_count()} process(es)\n"
      f"{'check':20}{'error':>10}{'limit':>10}"
    )
  for name, (check, limit) in CHECKS.items():
    error = check()
    good = error <= limit  # False for NaN
    failed += not good
    if host0 or not good:
      verdict = "ok" if good else f"WRONG on process {jax.process_index()}"
      print(f"{name:20}{error:10.1e}{limit:10.1e}  {verdict}", flush=True)
  if host0:
    print(f"{time.perf_counter() - begin:.0f} s")
  return min(failed, 1)


if __name__ == "__main__":
  argparse.ArgumentParser(
    prog="python -m simclr_jax.selftest",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  ).parse_args()  # --help, and no other flag
  cli.setup()
  with hosts.together():
    code = main()
  sys.exit(code)
