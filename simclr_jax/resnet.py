"""ResNet v1, 18 to 200 layers, as SimCLRv2 has it.

Post-activation blocks; the stride sits on the 3x3 convolution; strided
convolutions pad by kernel size alone; with selective kernels (Li et al. 2019)
the stem and the shortcuts are those of ResNet-D (He et al. 2018). Source of
every number: the official `resnet.py`, checked against its outputs in
`tests/test_models.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import layers, pooling
from simclr_jax.config import UserError

# depth: (blocks in each group, bottleneck blocks?)
DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}
STEMS = ("imagenet", "cifar")
POOL_PADDINGS = {"same": "SAME", "torch": ((1, 1), (1, 1))}


def check_architecture(
  *, depth, width, sk_ratio, stem, pool_padding="same"
) -> None:
  """Raises UserError for a network that does not exist."""
  if depth not in DEPTHS:
    raise UserError(
      f"model.depth: got {depth}, allowed are {', '.join(map(str, DEPTHS))}"
    )
  if not width > 0 or round(32 * width) < 1:
    raise UserError(
      f"model.width: got {width}, must be above 1/64 (1 is the paper's "
      "ResNet, 0.25 a quarter of its channels)"
    )
  if not 0 <= sk_ratio <= 1:
    raise UserError(
      f"model.sk_ratio: got {sk_ratio}, allowed are 0 (no selective "
      "kernels) to 1; the paper has 0.0625"
    )
  if sk_ratio > 0 and not DEPTHS[depth][1]:
    raise UserError(
      f"model.sk_ratio: got {sk_ratio} with model.depth {depth}, but "
      "selective kernels need bottleneck blocks; take depth 50 or more, or "
      "sk_ratio 0"
    )
  if stem not in STEMS:
    raise UserError(
      f'model.stem: got "{stem}", allowed are "imagenet" (7x7 stride 2 and '
      'max-pool) and "cifar" (3x3, for images up to 32 pixels)'
    )
  if pool_padding not in POOL_PADDINGS:
    raise UserError(
      f'pool_padding: got "{pool_padding}", allowed are "same" (official) '
      'and "torch" (torchvision)'
    )


class Stem(nn.Module):
  """Images to (the last convolution's output, the first group's input)."""

  kind: str
  filters: int  # channels given to the first group
  stem_filters: int  # channels inside a ResNet-D stem
  resnet_d: bool
  pool_padding: str
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    if self.kind == "cifar":
      x = self.conv(self.filters, 3, name="conv_1")(x)
      return x, self.norm(name="bn_1")(x, relu=True)
    if self.resnet_d:
      x = self.conv(self.stem_filters, 3, 2, name="conv_1")(x)
      x = self.norm(name="bn_1")(x, relu=True)
      x = self.conv(self.stem_filters, 3, name="conv_2")(x)
      x = self.norm(name="bn_2")(x, relu=True)
      x = self.conv(self.filters, 3, name="conv_3")(x)
      y = self.norm(name="bn_3")(x, relu=True)
    else:
      x = self.conv(self.filters, 7, 2, name="conv_1")(x)
      y = self.norm(name="bn_1")(x, relu=True)
    padding = POOL_PADDINGS[self.pool_padding]
    if padding == "SAME":
      padding = jax.lax.padtype_to_pads(y.shape[1:3], (3, 3), (2, 2), padding)
    return x, pooling.max_pool(y, tuple(padding))


def _shortcut(x, filters, strides, *, resnet_d, conv, norm):
  """The projection shortcut; ResNet-D pools before a 1x1 of stride 1."""
  if resnet_d:
    x = pooling.mean_pool(x, strides)
    strides = 1
  x = conv(filters, 1, strides, name="shortcut_conv")(x)
  return norm(name="shortcut_bn")(x)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions (depth 18 and 34)."""

  filters: int
  strides: int
  project: bool
  sk_ratio: float
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    shortcut = x
    if self.project:
      shortcut = _shortcut(
        x,
        self.filters,
        self.strides,
        resnet_d=False,
        conv=self.conv,
        norm=self.norm,
      )
    x = self.conv(self.filters, 3, self.strides, name="conv_1")(x)
    x = self.norm(name="bn_1")(x, relu=True)
    x = self.conv(self.filters, 3, name="conv_2")(x)
    norm = self.norm(name="bn_2", scale_init=nn.initializers.zeros)
    return norm(x, shortcut, relu=True)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 (or two selective 3x3 streams) and 1x1 to four times wider."""

  filters: int
  strides: int
  project: bool
  sk_ratio: float
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    shortcut = x
    if self.project:
      shortcut = _shortcut(
        x,
        4 * self.filters,
        self.strides,
        resnet_d=self.sk_ratio > 0,
        conv=self.conv,
        norm=self.norm,
      )
    x = self.conv(self.filters, 1, name="conv_1")(x)
    x = self.norm(name="bn_1")(x, relu=True)
    num_streams = 2 if self.sk_ratio > 0 else 1
    x = self.conv(num_streams * self.filters, 3, self.strides, name="conv_2")(x)
    x = self.norm(name="bn_2")(x, relu=True)
    if num_streams == 2:
      x = self._select(x)
    x = self.conv(4 * self.filters, 1, name="conv_3")(x)
    norm = self.norm(name="bn_3", scale_init=nn.initializers.zeros)
    return norm(x, shortcut, relu=True)

  def _select(self, x):
    """Weighs two streams, [n, H, W, 2F] to [n, H, W, F], channel by channel."""
    streams = x.reshape(*x.shape[:-1], 2, self.filters)
    gate = streams.sum(-2).mean((1, 2), keepdims=True)
    squeezed = max(int(self.filters * self.sk_ratio), 32)
    gate = self.conv(squeezed, 1, name="gate_conv_1")(gate)
    gate = self.norm(name="gate_bn")(gate, relu=True)
    gate = self.conv(2 * self.filters, 1, name="gate_conv_2")(gate)
    gate = gate.reshape(*gate.shape[:-1], 2, self.filters)
    return (streams * nn.softmax(gate, axis=-2)).sum(-2)


class BlockGroup(nn.Module):
  """Blocks of one resolution; the first one projects, and may stride."""

  block: Any
  num_blocks: int
  filters: int
  strides: int
  sk_ratio: float
  conv: Callable[..., Any]
  norm: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    for i in range(self.num_blocks):
      x = self.block(
        filters=self.filters,
        strides=self.strides if i == 0 else 1,
        project=i == 0,
        sk_ratio=self.sk_ratio,
        conv=self.conv,
        norm=self.norm,
        name=f"block_{i}",
      )(x)
    return x


class ResNet(nn.Module):
  """Images [n, H, W, C], float, to {"h": [n, features], endpoints}.

  Endpoints are "initial_conv" (before its BatchNorm), "initial_max_pool" (the
  first group's input) and "block_group1" .. "block_group4", in `dtype`; h is
  their mean over space in float32 or above. `freeze_after_block` k >= 0 runs
  the stem (0) and the groups up to k with moving averages even in training,
  and lets no gradient into them; -1 freezes nothing. `remat` recomputes each
  block in the backward pass: memory of one block plus the blocks' inputs, for
  a third more arithmetic.
  """

  depth: int
  stem: str
  width: float = 1
  sk_ratio: float = 0.0
  pool_padding: str = "same"
  freeze_after_block: int = -1
  remat: bool = False
  dtype: Any = jnp.float32
  axis_name: str | None = None
  bn_group_size: int = 0
  conv_general_dilated: Callable[..., Any] = jax.lax.conv_general_dilated

  @nn.compact
  def __call__(self, images, *, train=False):
    conv = functools.partial(
      layers.conv, dtype=self.dtype, conv_fn=self.conv_general_dilated
    )

    def norm(group):
      return layers.batch_norm(
        train=train and group > self.freeze_after_block,
        dtype=self.dtype,
        axis_name=self.axis_name,
        group_size=self.bn_group_size,
        initializing=self.is_initializing(),
      )

    def boundary(x, group):
      frozen = group == self.freeze_after_block
      return jax.lax.stop_gradient(x) if frozen else x

    num_blocks, is_bottleneck = DEPTHS[self.depth]
    block = BottleneckBlock if is_bottleneck else BasicBlock
    if self.remat:
      block = nn.remat(block)
    block = nn.jit(block)  # equal blocks are traced and lowered once
    filters = round(64 * self.width)
    outputs = {}
    outputs["initial_conv"], x = Stem(
      kind=self.stem,
      filters=filters,
      stem_filters=round(32 * self.width),
      resnet_d=self.sk_ratio > 0,
      pool_padding=self.pool_padding,
      conv=conv,
      norm=norm(0),
      name="stem",
    )(images)
    outputs["initial_max_pool"] = x = boundary(x, 0)
    for group in range(1, 5):
      x = BlockGroup(
        block=block,
        num_blocks=num_blocks[group - 1],
        filters=filters * 2 ** (group - 1),
        strides=1 if group == 1 else 2,
        sk_ratio=self.sk_ratio,
        conv=conv,
        norm=norm(group),
        name=f"block_group{group}",
      )(x)
      outputs[f"block_group{group}"] = x = boundary(x, group)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    outputs["h"] = x.mean((1, 2), dtype=wide)
    return outputs
