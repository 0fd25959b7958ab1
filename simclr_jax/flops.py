"""Counts the arithmetic of a function: its convolutions and matrix products.

From the traced function, so that it is the same on every device; XLA's own
count is not to be had on GPUs.
"""

import math

import jax
from jax.extend import core


def count(fn, *args) -> float:
  """FLOPs of a call: two for each multiplication of a sum of products.

  Args:
    fn: what JAX can trace; a mapped function counts for one device.
    *args: arrays, or their ShapeDtypeStructs.

  A scan counts once an iteration, a while loop once (its length is unknown), a
  cond as its dearest branch. Zeros that pad images count, those that a strided
  gradient puts between pixels do not.

  >>> import jax.numpy as jnp
  >>> count(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 4)))
  48
  """
  return _of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def _of_jaxpr(jaxpr) -> float:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _of_product(equation)
  if name == "conv_general_dilated":
    return _of_convolution(equation)
  if name == "cond":
    return max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
  times = params["length"] if name == "scan" else 1
  return times * sum(_of_jaxpr(j) for j in core.jaxprs_in_params(params))


def _of_product(equation) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  return 2 * math.prod(out) * math.prod(left[i] for i in contracted)


def _of_convolution(equation) -> float:
  params, kernel = equation.params, equation.invars[1].aval.shape
  _, *axes = params["dimension_numbers"].rhs_spec  # the first is of outputs
  products = math.prod(kernel[i] for i in axes)
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * products / math.prod(params["lhs_dilation"])
