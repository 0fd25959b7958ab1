"""weights.py: one tree put into another, and how two of them differ."""

import jax
import numpy as np
import pytest
import test_checkpoint

from simclr_jax import weights
from simclr_jax.config import UserError


def test_merge_takes_all_but_what_is_new():
  new, old = test_checkpoint.make_state(1), test_checkpoint.make_state(2)
  names = ("params", "batch_stats")
  new, old = ({k: s[k] for k in names} for s in (new, old))
  old["params"]["classifier"]["bias"] = np.ones(7, np.float32)
  new["params"] = jax.tree.map(np.float64, new["params"])
  merged = weights.merge(new, old, new=("classifier",), where="run X")
  assert merged["params"]["encoder"] is not new["params"]["encoder"]
  np.testing.assert_equal(merged["params"]["encoder"], old["params"]["encoder"])
  assert {x.dtype for x in jax.tree.leaves(merged["params"])} == {
    np.dtype("float64")
  }
  np.testing.assert_equal(
    merged["params"]["classifier"], new["params"]["classifier"]
  )
  with pytest.raises(UserError, match=r"run X holds another network: .*\(7,\)"):
    weights.merge(new, old, where="run X")


def test_merge_names_what_is_missing_and_the_nearest():
  new = {"params": {"encoder": {"conv_1": np.zeros(1)}}}
  old = {"params": {"encoder": {"conv_2": np.zeros(1)}}}
  with pytest.raises(UserError) as error:
    weights.merge(new, old, where="run X")
  text = str(error.value)
  assert "missing encoder/conv_1 (nearest: encoder/conv_2)" in text
  assert "not expected encoder/conv_2" in text
