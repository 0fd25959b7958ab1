"""What is counted, by hand and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import flops, resnet


def conv(x, w, stride=1):
  return jax.lax.conv_general_dilated(
    x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_products():
  a, b = jnp.ones((4, 2, 3)), jnp.ones((4, 3, 5))
  assert flops.count(jnp.matmul, a, b) == 2 * 4 * 2 * 3 * 5
  assert flops.count(jax.jit(jnp.matmul), a, b) == 2 * 4 * 2 * 3 * 5
  assert flops.count(jnp.add, a, a) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
  x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
  one = 2 * 2 * (8 // stride) ** 2 * 5 * 27
  assert flops.count(lambda x, w: conv(x, w, stride), x, w) == one
  gradient = jax.grad(lambda x, w: conv(x, w, stride).sum(), (0, 1))
  assert flops.count(gradient, x, w) == 3 * one


def test_loops_and_branches():
  a = jnp.ones((4, 4))
  one = 2 * 4**3

  def five(a):
    return jax.lax.scan(lambda c, _: (c @ c, None), a, length=5)[0]

  def either(a):
    return jax.lax.cond(a[0, 0] > 0, five, lambda a: a, a)

  assert flops.count(five, a) == 5 * one
  assert flops.count(either, a) == 5 * one


def test_a_mapped_function_counts_for_one_device():
  a = np.ones((jax.device_count(), 4, 4), np.float32)
  assert flops.count(jax.pmap(lambda a: a @ a), a) == 2 * 4**3


def test_flops_of_resnet50():
  """4.1 G products forward (He et al. 2015: 3.8 without the shortcuts')."""
  model = resnet.ResNet(depth=50, stem="imagenet")
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  count = flops.count(model.apply, variables, images)
  assert count / 2 == pytest.approx(4.1e9, rel=0.05)
  cost = jax.jit(model.apply).lower(variables, images).cost_analysis()
  assert count == pytest.approx(cost["flops"], rel=0.05)
