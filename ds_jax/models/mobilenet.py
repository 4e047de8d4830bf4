"""DS-MobileNet: MobileNetV1 blocks with attention, sliced in width.

Axes: N batch, H, W, C channels, K buckets.

Depthwise 3x3, batch norm, swish, attention, pointwise, batch norm, swish; no
skips; global average pool and one classifier (DS-Net, section 4; the widths
are those of the authors' release). Everything before the attention of the
gated stage's first block is the trunk, and runs at the narrowest slices for
every bucket; bucket k runs the rest at its k-th widths.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import nn
from ds_jax.models import subnet as subnets
from ds_jax.nn import conv, gate

_STEM_STRIDE = 2
_KERNEL_SIZE = 3


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """The shape of one stage.

  Attributes:
    widths: the slice list, narrowest first.
    depth: how many blocks.
    stride: of the first block.
  """

  widths: tuple[int, ...]
  depth: int = 1
  stride: int = 1

  def __post_init__(self):
    object.__setattr__(self, 'widths', tuple(self.widths))
    if not self.widths or list(self.widths) != sorted(set(self.widths)):
      raise ValueError(
        f'Widths {self.widths} must be one or more, strictly increasing.'
      )
    if self.depth < 1 or self.stride not in (1, 2):
      raise ValueError(
        f'A stage needs depth >= 1 and stride 1 or 2, got {self.depth} and'
        f' {self.stride}.'
      )


class SeparableBlock(nnx.Module):
  """Depthwise and pointwise convolution with attention between them."""

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    stride: int,
    rows_in: int,
    rows: int,
    num_buckets: int | None,
    reduced: int,
    rngs: nnx.Rngs,
  ):
    """Makes the full-size block.

    Args:
      in_features: the widest input.
      features: the widest output.
      stride: of the depthwise convolution.
      rows_in: rows of statistics of the norm after the depthwise convolution.
      rows: rows of statistics of the norm after the pointwise convolution.
      num_buckets: K in the gated block, None elsewhere.
      reduced: the width of the attention's and gate's shared reduction.
      rngs: the stream `params` initialises the weights.
    """
    self.depthwise = nn.SlicedDepthwiseConv(
      in_features, _KERNEL_SIZE, stride=stride, rngs=rngs
    )
    self.depthwise_norm = nn.SlicedBatchNorm(in_features, rows_in)
    self.gate = nn.DoubleHeadedGate(
      in_features, num_buckets, reduced=reduced, rngs=rngs
    )
    self.pointwise = nn.SlicedDense(
      in_features, features, use_bias=False, rngs=rngs
    )
    self.pointwise_norm = nn.SlicedBatchNorm(features, rows)

  def extract(self, x, row, momentum=None):
    """The part before the attention: depthwise, norm, swish."""
    x = self.depthwise(x)
    return jax.nn.swish(self.depthwise_norm(x, row, momentum))

  def project(self, x, features, row, momentum=None):
    """The part from the attention on: attention, pointwise, norm, swish."""
    x = self.pointwise(self.gate.attention(x), features)
    return jax.nn.swish(self.pointwise_norm(x, row, momentum))


class MobileNet(nnx.Module):
  """The supernet; `model(images, subnet)` runs one sub-network of it.

  Attributes:
    routing_space: the buckets, cheapest first.
    narrowest: the first bucket.
    widest: every slice full; a bucket only if the trunk has one width a stage.
  """

  def __init__(
    self,
    *,
    num_classes: int,
    stem_widths: Sequence[int],
    stages: Sequence[StageSpec | Mapping],
    gate_stage: int,
    gate_width: int | None = None,
    dropout_rate: float = 0.0,
    dtype: str = 'float32',
    rngs: nnx.Rngs,
  ):
    """Makes the full-size parameters.

    Args:
      num_classes: outputs of the classifier.
      stem_widths: the stem's slice list, narrowest first.
      stages: the stages; mappings are read as `StageSpec(**mapping)`.
      gate_stage: the index of the stage whose first block holds the gate. From
        it on, every stage has K widths, one a bucket.
      gate_width: the features that the slimming head decides by: the width of
        the gated block's reduction. None means a quarter of the block's input,
        as published, which is few in a narrow network.
      dropout_rate: before the classifier, where a call brings an `rng`.
      dtype: what activations are computed in, `float32` or `bfloat16`.
      rngs: the stream `params` initialises the weights.

    Raises:
      ValueError: if the stages do not make a routing space.
    """
    if dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"dtype={dtype!r}: expected 'float32' or 'bfloat16'.")
    stem = StageSpec(tuple(stem_widths))
    stages = tuple(
      s if isinstance(s, StageSpec) else StageSpec(**s) for s in stages
    )
    self.specs = (stem, *stages)
    self.gate_stage = gate_stage
    self._gate_width = gate_width
    self.num_classes = num_classes
    self.dropout_rate = dropout_rate
    self.dtype = dtype
    self.routing_space, self.widest = _routing_space(stem, stages, gate_stage)
    self.narrowest = self.routing_space[0]
    # The trunk tells apart two sub-networks at most, the rest tells apart all.
    self._trunk_rows = 1 if self.widest in self.routing_space else 2
    self._branch_rows = self.widest.index + 1

    self.stem = nn.SlicedConv(
      3, stem.widths[-1], _KERNEL_SIZE, stride=_STEM_STRIDE, rngs=rngs
    )
    self.stem_norm = nn.SlicedBatchNorm(stem.widths[-1], self._trunk_rows)
    self.stages = nnx.List(
      [self._make_stage(i, rngs) for i in range(len(stages))]
    )
    self.classifier = nn.SlicedDense(
      stages[-1].widths[-1], num_classes, rngs=rngs
    )

  def _make_stage(self, stage: int, rngs: nnx.Rngs) -> nnx.List:
    """Makes a stage's full-size blocks."""
    # `specs` starts with the stem, so a stage's input is at its own index.
    width_in, spec = self.specs[stage].widths[-1], self.specs[stage + 1]
    in_trunk = stage < self.gate_stage
    rows = self._trunk_rows if in_trunk else self._branch_rows
    blocks = nnx.List([])
    for j in range(spec.depth):
      gated = (stage, j) == (self.gate_stage, 0)
      block = SeparableBlock(
        width_in,
        spec.widths[-1],
        stride=spec.stride if j == 0 else 1,
        rows_in=self._trunk_rows if gated else rows,
        rows=rows,
        num_buckets=len(self.routing_space) if gated else None,
        reduced=self._reduced_width(stage, j, width_in),
        rngs=rngs,
      )
      blocks.append(block)
      width_in = spec.widths[-1]
    return blocks

  def __call__(
    self,
    images: jax.Array,
    subnet: subnets.Subnet,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Runs one sub-network.

    Args:
      images: (N, H, W, 3) float, normalised.
      subnet: one of `routing_space`, or `widest`.
      momentum: None for inference; for training, the share of the batch in the
        running statistics (see `SlicedBatchNorm`).
      rng: a key for dropout; None drops nothing.

    Returns:
      Logits (N, num_classes), float32.
    """
    features = self.trunk(images, subnet, momentum=momentum)
    return self.branch(features, subnet, momentum=momentum, rng=rng)

  def trunk(
    self,
    images: jax.Array,
    subnet: subnets.Subnet | None = None,
    *,
    momentum: float | jax.Array | None = None,
  ) -> jax.Array:
    """Runs the part that all buckets share, up to the gate.

    Args:
      images: (N, H, W, 3) float, normalised.
      subnet: None means the narrowest, as for every bucket.
      momentum: as in `__call__`.

    Returns:
      The gate's features (N, h, w, c).
    """
    _check_images(images)
    subnet = subnet or self.narrowest
    row = self._trunk_row(subnet)
    x = self.stem(images.astype(self.dtype), subnet.stem.width)
    x = jax.nn.swish(self.stem_norm(x, row, momentum))
    for i in range(self.gate_stage):
      for block in self.stages[i]:
        x = block.extract(x, row, momentum)
        x = block.project(x, subnet.stages[i].width, row, momentum)
    return self.stages[self.gate_stage][0].extract(x, row, momentum)

  def gate_logits(self, features: jax.Array) -> jax.Array:
    """Returns the slimming head's logits (N, K) of the trunk's features."""
    return self.stages[self.gate_stage][0].gate.logits(features)

  def branch(
    self,
    features: jax.Array,
    subnet: subnets.Subnet,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the rest, from the gate's features (N, h, w, c) to logits."""
    x, row = features, subnet.index
    for i in range(self.gate_stage, len(self.stages)):
      for j, block in enumerate(self.stages[i]):
        if i > self.gate_stage or j > 0:
          x = block.extract(x, row, momentum)
        x = block.project(x, subnet.stages[i].width, row, momentum)
    x = x.astype(jnp.float32).mean((1, 2))
    if rng is not None and self.dropout_rate > 0:
      keep = jax.random.bernoulli(rng, 1 - self.dropout_rate, x.shape)
      x = jnp.where(keep, x / (1 - self.dropout_rate), 0.0)
    return self.classifier(x)

  def cost(self, subnet: subnets.Subnet, image_size: int) -> subnets.Cost:
    """Returns what one image of `image_size` pixels a side costs."""
    side = conv.output_size(image_size, _STEM_STRIDE)
    width = subnet.stem.width
    total = subnets.conv_cost(side**2, _KERNEL_SIZE, 3, width)
    total += subnets.norm_cost(width)
    full_in = self.specs[0].widths[-1]
    for i, stage in enumerate(subnet.stages):
      spec = self.specs[1 + i]
      for j in range(spec.depth):
        side = conv.output_size(side, spec.stride if j == 0 else 1)
        reduced = self._reduced_width(i, j, full_in)
        total += _block_cost(side**2, width, stage.width, reduced)
        width, full_in = stage.width, spec.widths[-1]
    total += subnets.pool_cost(side**2, width)
    return total + subnets.dense_cost(width, self.num_classes)

  def _reduced_width(self, stage: int, block: int, full_in: int) -> int:
    if self._gate_width and (stage, block) == (self.gate_stage, 0):
      return self._gate_width
    return gate.reduced_width(full_in)

  def _trunk_row(self, subnet: subnets.Subnet) -> int:
    return 0 if subnet.index < len(self.routing_space) else 1


def _block_cost(area, width_in, width, reduced) -> subnets.Cost:
  return (
    subnets.depthwise_cost(area, _KERNEL_SIZE, width_in)
    + subnets.norm_cost(width_in)
    + subnets.pool_cost(area, width_in)
    + subnets.dense_cost(width_in, reduced)
    + subnets.dense_cost(reduced, width_in)
    + subnets.conv_cost(area, 1, width_in, width)
    + subnets.norm_cost(width)
  )


def _routing_space(stem, stages, gate_stage):
  """Returns the buckets and the widest sub-network."""
  if not 0 <= gate_stage < len(stages):
    raise ValueError(
      f'gate_stage={gate_stage} is not one of the {len(stages)} stages.'
    )
  num_buckets = len(stages[gate_stage].widths)
  for i, spec in enumerate(stages[gate_stage:], gate_stage):
    if len(spec.widths) != num_buckets:
      raise ValueError(
        f'Stage {i} has {len(spec.widths)} widths; from the gated stage'
        f' {gate_stage} on, each needs {num_buckets}, one a bucket.'
      )
  trunk, branch = (stem, *stages[:gate_stage]), stages[gate_stage:]

  def subnet(index, trunk_index, branch_index):
    slices = [subnets.StageSlice(s.widths[trunk_index]) for s in trunk]
    slices += [subnets.StageSlice(s.widths[branch_index]) for s in branch]
    return subnets.Subnet(index, slices[0], tuple(slices[1:]))

  routing_space = tuple(subnet(k, 0, k) for k in range(num_buckets))
  if all(len(s.widths) == 1 for s in trunk):
    return routing_space, routing_space[-1]
  return routing_space, subnet(num_buckets, -1, -1)


def _check_images(images):
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(
      f'Images of shape {images.shape}: expected (N, H, W, 3), NHWC.'
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'Images of dtype {images.dtype}: expected normalised floats; see'
      ' ds_jax.data.normalize.'
    )
