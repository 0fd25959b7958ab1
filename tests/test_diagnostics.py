"""What is said about a run's numbers, and when."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_loop

from simclr_jax import diagnostics, metrics
from simclr_jax.config import Diverged
from simclr_jax.train_state import TrainState, group_of, tensor_names

PARAMS = {
  "classifier": {"kernel": np.full((2, 2), 3.0, np.float32)},
  "encoder": {
    "block_group1": {
      "a": np.array([3.0, 4.0], np.float32),
      "b": np.array([12.0], np.float32),
    },
    "stem": {"kernel": np.ones((4, 1), np.float32)},
  },
}
NAMES = tensor_names(PARAMS)


def test_tensors_are_named_and_grouped():
  assert NAMES == [
    "classifier/kernel",
    "encoder/block_group1/a",
    "encoder/block_group1/b",
    "encoder/stem/kernel",
  ]
  groups = [group_of(name) for name in NAMES]
  assert groups == ["classifier", "block_group1", "block_group1", "stem"]


def test_norms_of_an_update():
  optimizer = optax.sgd(0.5)
  state = TrainState(jnp.int32(0), PARAMS, {}, optimizer.init(PARAMS))
  grads = jax.tree.map(lambda x: 2 * x, PARAMS)
  state, norms = jax.jit(
    lambda state, grads: state.apply_gradients(optimizer, grads, {})
  )(state, grads)
  values = diagnostics.summarize({"loss": np.float32(1), **norms}, NAMES)
  # 3, 4 and 12 make 13; the update takes everything away.
  assert values["grad_norm/block_group1"] == pytest.approx(26)
  assert values["update_norm/block_group1"] == pytest.approx(13)
  assert values["param_norm/block_group1"] == 0
  assert values["grad_norm/classifier"] == pytest.approx(12)
  assert values["loss"] == 1


def test_moments_tell_rank_spread_and_uniformity():
  z = np.random.default_rng(0).normal(size=(64, 8)) * [4, 3, 2, 1, 1, 1, 1, 1]
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  moments = metrics.embedding_moments(jnp.asarray(z, jnp.float32))
  potential = np.exp(float(metrics.uniformity(jnp.asarray(z))))
  got = diagnostics.summarize(
    {"loss": 1.0, "gaussian_potential": potential, **moments}, []
  )
  assert got.keys() == {
    "loss",
    "effective_rank",
    "embedding_std",
    "uniformity",
  }
  rank = float(metrics.effective_rank(jnp.asarray(unit)))
  assert got["effective_rank"] == pytest.approx(rank, rel=1e-5)
  spread = float(metrics.embedding_std(jnp.asarray(z)))
  assert got["embedding_std"] == pytest.approx(spread, rel=1e-5)
  assert got["uniformity"] == pytest.approx(math.log(potential))


def test_what_is_not_finite_is_named():
  def norms(kind, at):
    values = np.ones(4)
    values[at] = np.inf
    return {"loss": 1.0, f"{kind}_norms": values}

  def problem(values):
    return diagnostics.not_finite(values, NAMES)

  assert problem({"loss": 1.0, "grad_norms": np.ones(4)}) == ""
  assert "the loss is nan" in problem({"loss": math.nan})
  found = problem(norms("grad", 2))
  assert found == "the gradient of encoder/block_group1/b is not finite"
  # The gradient breaks the update, and that the value.
  both = norms("param", 3) | norms("update", 1) | norms("grad", 2)
  assert problem(both) == found
  found = problem(norms("param", 3))
  assert found == "the value of encoder/stem/kernel is not finite"
  found = problem(norms("update", 0))
  assert found == "the update of classifier/kernel is not finite"
  # The classifier beside pretraining may go its own way.
  assert problem(norms("update", 0) | {"probe_loss": 9.0}) == ""


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
  def step_fn(state, batch, key):
    state, metrics = test_loop.step_fn(state, batch, key)
    return state, metrics | {
      "grad_norms": jnp.where(state.step == 4, jnp.inf, metrics["grad_norms"])
    }

  with pytest.raises(Diverged, match="step 4 the gradient of encoder/kernel"):
    test_loop.train(tmp_path, step_fn=step_fn)
  marker = json.loads((tmp_path / "diverged.json").read_text())
  assert marker["step"] == 4


def healthy(**changes):
  values = {"loss": 5.0, "effective_rank": 30.0, "input_wait": 0.01}
  return values | changes


def advised(lines, **options):
  options = {"num_pairs": 512, "temperature": 0.5, "warmup_steps": 10} | options
  advice = diagnostics.Advice(**options)
  said = [advice(10 * (i + 1), line) for i, line in enumerate(lines)]
  return [len(s) for s in said], " ".join(
    text for texts in said for text in texts
  )


def test_a_healthy_run_gets_no_advice():
  assert advised([healthy()] * 9) == ([0] * 9, "")
  assert advised([healthy(input_wait=0.19)] * 9) == ([0] * 9, "")


@pytest.mark.parametrize(
  ("change", "after", "words"),
  [
    ({"loss": metrics.uniform_loss(512)}, 4, "say nothing (13.86)"),
    ({"effective_rank": 1.2}, 1, "effective rank 1.20"),
    ({"input_wait": 0.6}, 3, "60% of the time"),
  ],
)
def test_advice_is_given_once(change, after, words):
  counts, text = advised([healthy(**change)] * 9)
  assert counts == [int(i + 1 == after) for i in range(9)]
  assert words in text
  # Once in between is no trend (but a collapse is one at once).
  lines = [healthy(**change), healthy()] * 4
  assert sum(advised(lines)[0]) == (after == 1)


def test_small_batches_and_temperatures():
  for num_pairs, temperature, small in [
    (4096, 0.1, False),  # official
    (512, 0.5, False),  # official, CIFAR-10
    (256, 0.2, False),
    (256, 0.1, True),
    (64, 0.07, True),
  ]:
    counts, text = advised(
      [healthy()], num_pairs=num_pairs, temperature=temperature
    )
    assert counts == [int(small)], (num_pairs, temperature)
    assert ("temperature of" in text) == small
  # With the temperature that it names it is content.
  text = advised([healthy()], num_pairs=64, temperature=0.05)[1]
  better = float(text.split("temperature of ")[1].split()[0])
  assert advised([healthy()], num_pairs=64, temperature=better)[0] == [0]


def test_peaks_are_of_the_longest_name():
  assert diagnostics.peak_tflops("TPU v5 lite") == 197
  assert diagnostics.peak_tflops("TPU v5p") == 459
  assert diagnostics.peak_tflops("NVIDIA H100 80GB HBM3") == 989
  assert diagnostics.peak_tflops("NVIDIA L4") == 121
  assert diagnostics.peak_tflops("NVIDIA L40S") == 362
  assert diagnostics.peak_tflops("NVIDIA GH200 480GB") == 989
  assert diagnostics.peak_tflops("NVIDIA B200") == 2250
  assert diagnostics.peak_tflops("NVIDIA GB200") == 2500
  assert diagnostics.peak_tflops("TPU v6 lite") == 918
  assert diagnostics.peak_tflops("TPU7x") == 1153.5
  assert diagnostics.peak_tflops("NVIDIA RTX A6000") is None
  assert diagnostics.peak_tflops("cpu") is None


def test_utilisation_where_the_peak_is_known(tmp_path, monkeypatch):
  kind = jax.devices()[0].device_kind
  monkeypatch.setitem(diagnostics.PEAK_TFLOPS, kind, 1e-9)
  stats = types.SimpleNamespace(
    memory_stats=lambda: {"peak_bytes_in_use": 2**31}
  )
  monkeypatch.setattr(diagnostics.jax, "local_devices", lambda: [stats])
  assert diagnostics.device_memory_gib() == 2
  monkeypatch.undo()
  monkeypatch.setitem(diagnostics.PEAK_TFLOPS, kind, 1e-9)
  test_loop.train(tmp_path)
  rows = test_loop.raw_lines(tmp_path)
  timed = [row for row in rows if "utilisation" in row]
  assert timed
  for row in timed:
    assert row["utilisation"] > 0 and row["tflops_per_device"] >= 0
    assert 0 <= row["input_wait"] <= 1


def test_a_trace_of_some_steps(tmp_path):
  config = test_loop.make_config(profile_steps=(3, 4))
  test_loop.train(tmp_path, num_steps=6, config=config)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
