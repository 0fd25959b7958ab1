"""ResNet-18, its head and SimCLR's losses in NumPy, with their gradient.

Written from the description of the official graph (variables by TF1 names, in
their order of construction; paddings by kernel size; BatchNorm by the biased
moments of the batch), in float64, to compare whole training steps with.
"""

import numpy as np


class Node:
  """An array, its gradient, and how that passes to what it came from."""

  def __init__(self, value, tape, backward=None):
    self.value = np.asarray(value, np.float64)
    self.grad = np.zeros_like(self.value)
    self.tape, self.backward = tape, backward
    tape.append(self)


def conv(x, w, stride=1):
  """[n, H, W, C] by [k, k, C, F], padded by the kernel's size alone."""
  size = len(w.value)
  before = (size - 1) // 2
  pad = (before, size - 1 - before)
  padded = np.pad(x.value, [(0, 0), pad, pad, (0, 0)])
  length = stride * ((padded.shape[1] - size) // stride + 1)
  taps = [
    (i, j, np.s_[:, i : i + length : stride, j : j + length : stride])
    for i in range(size)
    for j in range(size)
  ]

  def backward(g):
    back = np.zeros_like(padded)
    for i, j, tap in taps:
      back[tap] += g @ w.value[i, j].T
      w.grad[i, j] += np.einsum("nhwc,nhwf->cf", padded[tap], g)
    inside = slice(before, before + x.value.shape[1])
    x.grad += back[:, inside, inside]

  y = sum(padded[tap] @ w.value[i, j] for i, j, tap in taps)
  return Node(y, x.tape, backward)


def dense(x, w, b=None):
  def backward(g):
    x.grad += g @ w.value.T
    w.grad += x.value.T @ g
    if b is not None:
      b.grad += g.sum(0)

  y = x.value @ w.value + (0 if b is None else b.value)
  return Node(y, x.tape, backward)


def batch_norm(x, gamma, beta, moving):
  """`moving` is [mean, variance], averaged in place with momentum 0.9."""
  axes = tuple(range(x.value.ndim - 1))
  mean, variance = x.value.mean(axes), x.value.var(axes)
  for average, new in zip(moving, (mean, variance), strict=True):
    average *= 0.9
    average += 0.1 * new
  deviation = np.sqrt(variance + 1e-5)
  unit = (x.value - mean) / deviation

  def backward(g):
    gamma.grad += (g * unit).sum(axes)
    if beta is not None:
      beta.grad += g.sum(axes)
    g = g * gamma.value / deviation
    x.grad += g - g.mean(axes) - unit * (g * unit).mean(axes)

  y = unit * gamma.value + (0 if beta is None else beta.value)
  return Node(y, x.tape, backward)


def relu(x):
  def backward(g):
    x.grad += g * (x.value > 0)

  return Node(np.maximum(x.value, 0), x.tape, backward)


def add(a, b):
  def backward(g):
    a.grad += g
    b.grad += g

  return Node(a.value + b.value, a.tape, backward)


def pool(x):
  def backward(g):
    x.grad += g[:, None, None] / np.prod(x.value.shape[1:3])

  return Node(x.value.mean((1, 2)), x.tape, backward)


def cross_entropy(logits, targets):
  """Mean over rows, and its gradient; -inf among the logits is allowed."""
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  loss = -np.log(p[np.arange(len(p)), targets]).mean()
  return loss, (p - np.eye(p.shape[1])[targets]) / len(p)


def nt_xent(hidden, temperature):
  """mean(loss_a) + mean(loss_b), which is twice the mean over all rows."""
  norm = np.linalg.norm(hidden.value, axis=1, keepdims=True)
  z, n = hidden.value / norm, len(hidden.value) // 2
  logits = z @ z.T / temperature
  np.fill_diagonal(logits, -np.inf)
  loss, slope = cross_entropy(logits, np.roll(np.arange(2 * n), n))
  slope = 2 * slope / temperature
  g = slope @ z + slope.T @ z
  hidden.grad += (g - z * (g * z).sum(1, keepdims=True)) / norm
  return 2 * loss


def backward(tape):
  for node in reversed(tape):
    if node.backward is not None:
      node.backward(node.grad)


def resnet18_and_head(values, images, num_layers=3):
  """Train mode; values: TF1 name -> array, the moving averages change.

  Returns:
    ([h, head_1, ..] as Nodes, TF1 name -> Node of the trainable variables).
  """
  tape, counts = [], {"conv2d": 0, "batch_normalization": 0}
  nodes = {k: Node(v, tape) for k, v in values.items() if "moving_" not in k}

  def name(kind):
    number, counts[kind] = counts[kind], counts[kind] + 1
    return f"base_model/{kind}" + (f"_{number}" if number else "")

  def norm(x, at):
    moving = [values[f"{at}/moving_{m}"] for m in ("mean", "variance")]
    return batch_norm(x, nodes[f"{at}/gamma"], nodes.get(f"{at}/beta"), moving)

  def layer(x, stride=1):
    x = conv(x, nodes[name("conv2d") + "/kernel"], stride)
    return norm(x, name("batch_normalization"))

  x = relu(layer(Node(images, tape)))
  for stride in (1, 2, 2, 2):
    shortcut = layer(x, stride)
    x = relu(add(layer(relu(layer(x, stride))), shortcut))
    x = relu(add(layer(relu(layer(x))), x))
  hidden = [pool(x)]
  for k in range(num_layers):
    at = f"head_contrastive/nl_{k}"
    x = dense(hidden[-1], nodes[f"{at}/dense/kernel"])
    x = norm(x, f"{at}/batch_normalization")
    hidden.append(x if k == num_layers - 1 else relu(x))
  return hidden, nodes


def lars(values, momenta, grads, rate, weight_decay):
  """One step of the official optimizer, in place."""
  for name, g in grads.items():
    w, ratio = values[name], 1.0
    excluded = ("batch_normalization", "bias", "head_supervised")
    if not any(part in name for part in excluded):
      g = g + weight_decay * w
      norms = np.linalg.norm(w), np.linalg.norm(g)
      ratio = 0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0
    momenta[name] = 0.9 * momenta.get(name, 0) + rate * ratio * g
    values[name] = w - momenta[name]
