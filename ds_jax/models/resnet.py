"""DS-ResNet: v1.5 bottlenecks, sliced in width, inner width and depth.

Axes: N batch, H, W, C channels, K buckets.

A bottleneck is 1 x 1, batch norm, relu, 3 x 3 (with the stride), batch norm,
relu, attention, 1 x 1, batch norm, and the shortcut is added (He et al., "Deep
residual learning", 2015, with the stride of Goyal et al., 2017). Attention
scales the inner channels, as between DS-MobileNet's two convolutions; its head
`1 + tanh` is zero at the start, so ordinary ResNet weights still fit.

The stem and the stages before `gate_stage` are the trunk, and run at the
narrowest slices for every bucket. The gate reads the trunk's output: the
residual stream has four times the inner channels to decide by, and the branch
needs nothing else. Which stage: every bucket pays for the trunk and none gets
more than its narrowest slices there, so the later the gate, the closer the
cheapest and the largest bucket move together. In ResNet-50 a gate after the
first stage leaves buckets of 1.2 to 3.4 G MAdds.

The slice lists are ours: those of the paper's DS-ResNet-50 are not public.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import nn
from ds_jax.models import base, channels
from ds_jax.models import subnet as subnets
from ds_jax.nn import conv, gate


@dataclasses.dataclass(frozen=True)
class BottleneckStage:
  """The shape of one stage.

  Attributes:
    widths: slice list of the output channels, narrowest first.
    inner: slice list of the bottlenecks' inner channels.
    depths: slice list of how many blocks run.
    stride: of the first block.
  """

  widths: tuple[int, ...]
  inner: tuple[int, ...]
  depths: tuple[int, ...]
  stride: int = 1

  def __post_init__(self):
    for name in ('widths', 'inner', 'depths'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    subnets.check_lists(self)
    if self.stride not in (1, 2):
      raise ValueError(f'A stage needs stride 1 or 2, got {self.stride}.')

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice lists, by the field of `StageSlice` that they are of."""
    return {'width': self.widths, 'inner': self.inner, 'depth': self.depths}


@dataclasses.dataclass(frozen=True)
class Stem:
  """The first convolution.

  Attributes:
    widths: slice list of the output channels, narrowest first.
    kernel_size: of the convolution.
    stride: of the convolution.
    pool: whether a max pool of 3 x 3 and stride 2 follows.
  """

  widths: tuple[int, ...]
  kernel_size: int = 7
  stride: int = 2
  pool: bool = True

  def __post_init__(self):
    object.__setattr__(self, 'widths', tuple(self.widths))
    subnets.check_lists(self)
    if self.kernel_size % 2 == 0:
      raise ValueError(f'The stem needs an odd kernel, got {self.kernel_size}.')

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice lists, by the field of `StageSlice` that they are of."""
    return {'width': self.widths}


class Bottleneck(nnx.Module):
  """Three convolutions with attention before the last, and a shortcut."""

  def __init__(
    self,
    in_features: int,
    inner: int,
    features: int,
    *,
    stride: int,
    has_projection: bool,
    rows: int,
    rngs: nnx.Rngs,
  ):
    """Makes the full-size block.

    Args:
      in_features: the widest input.
      inner: the widest inner channels.
      features: the widest output.
      stride: of the 3 x 3 convolution and of the shortcut.
      has_projection: whether the shortcut is a convolution.
      rows: rows of statistics of the norms.
      rngs: the stream `params` initialises the weights.
    """
    self.reduce = nn.SlicedConv(in_features, inner, 1, rngs=rngs)
    self.reduce_norm = nn.SlicedBatchNorm(inner, rows)
    self.spatial = nn.SlicedConv(inner, inner, 3, stride=stride, rngs=rngs)
    self.spatial_norm = nn.SlicedBatchNorm(inner, rows)
    self.gate = nn.DoubleHeadedGate(
      inner, activation='one_plus_tanh', rngs=rngs
    )
    self.expand = nn.SlicedConv(inner, features, 1, rngs=rngs)
    self.expand_norm = nn.SlicedBatchNorm(features, rows)
    # The residual branch starts as zero, the block as its shortcut.
    self.expand_norm.scale[...] = jnp.zeros((features,))
    self.projection = (
      nn.SlicedConv(in_features, features, 1, stride=stride, rngs=rngs)
      if has_projection
      else None
    )
    self.projection_norm = (
      nn.SlicedBatchNorm(features, rows) if has_projection else None
    )

  def __call__(
    self,
    x: jax.Array,
    stage: subnets.StageSlice,
    row: int,
    momentum: float | jax.Array | None = None,
  ) -> jax.Array:
    """Takes x (N, H, W, c) to (N, h, w, stage.width)."""
    y = self.reduce_norm.after(self.reduce, x, stage.inner, row, momentum)
    y = jax.nn.relu(y)
    y = self.spatial_norm.after(self.spatial, y, stage.inner, row, momentum)
    y = self.gate.attention(jax.nn.relu(y))
    y = self.expand_norm.after(self.expand, y, stage.width, row, momentum)
    if self.projection is not None:
      x = self.projection_norm.after(
        self.projection, x, stage.width, row, momentum
      )
    return jax.nn.relu(x + y)


class ResNet(base.SlicedNetwork):
  """The supernet of bottlenecks."""

  def __init__(
    self,
    *,
    num_classes: int,
    stem: Stem | Mapping,
    stages: Sequence[BottleneckStage | Mapping],
    gate_stage: int,
    gate_buckets: Sequence[int] | None = None,
    gate_hidden: Sequence[int] = (64, 64),
    gate_pooling: str = 'mean_max_std',
    dropout_rate: float = 0.0,
    dtype: str = 'float32',
    rngs: nnx.Rngs,
  ):
    """Makes the full-size parameters.

    Args:
      num_classes: outputs of the classifier.
      stem: the stem; a mapping is read as `Stem(**mapping)`.
      stages: the stages; mappings are read as `BottleneckStage(**mapping)`.
      gate_stage: the index of the first stage of the branch. From it on, every
        slice list has K entries, or one for all buckets.
      gate_buckets: the sub-networks that the gate chooses from, two or more
        of the indices 0 to K - 1, rising; None means all K.
      gate_hidden: units of the gate's hidden layers; none makes it linear.
      gate_pooling: what the gate reads; see `SlimmingGate`.
      dropout_rate: before the classifier, where a call brings an `rng`.
      dtype: what activations are computed in, `float32` or `bfloat16`.
      rngs: the stream `params` initialises the weights.

    Raises:
      ValueError: if the stages do not make a routing space.
    """
    stem = stem if isinstance(stem, Stem) else Stem(**stem)
    stages = tuple(
      s if isinstance(s, BottleneckStage) else BottleneckStage(**s)
      for s in stages
    )
    super().__init__(
      *subnets.routing_space(stem, stages, gate_stage),
      num_classes=num_classes,
      gate_buckets=gate_buckets,
      dropout_rate=dropout_rate,
      dtype=dtype,
    )
    self.stem_spec, self.specs, self.gate_stage = stem, stages, gate_stage
    self.stem = nn.SlicedConv(
      3, stem.widths[-1], stem.kernel_size, stride=stem.stride, rngs=rngs
    )
    self.stem_norm = nn.SlicedBatchNorm(stem.widths[-1], self._trunk_rows)
    self.stages = nnx.List(
      [self._make_stage(i, rngs) for i in range(len(stages))]
    )
    before = [self.narrowest.stem, *self.narrowest.stages][gate_stage]
    self.slim = nn.SlimmingGate(
      before.width,
      len(self.routing_space),
      hidden=gate_hidden,
      pooling=gate_pooling,
      rngs=rngs,
    )
    self.classifier = nn.SlicedDense(
      stages[-1].widths[-1], num_classes, rngs=rngs
    )

  def _make_stage(self, stage: int, rngs: nnx.Rngs) -> nnx.List:
    """Makes a stage's full-size blocks."""
    spec, width_in = self.specs[stage], self._full_width_before(stage)
    rows = self._trunk_rows if stage < self.gate_stage else self._branch_rows
    blocks = nnx.List([])
    for j in range(spec.depths[-1]):
      block = Bottleneck(
        width_in,
        spec.inner[-1],
        spec.widths[-1],
        stride=spec.stride if j == 0 else 1,
        has_projection=j == 0,
        rows=rows,
        rngs=rngs,
      )
      blocks.append(block)
      width_in = spec.widths[-1]
    return blocks

  def _full_width_before(self, stage: int) -> int:
    spec = self.specs[stage - 1] if stage else self.stem_spec
    return spec.widths[-1]

  def trunk(self, images, subnet=None, *, momentum=None, rng=None):
    """See `SlicedNetwork`; returns (N, h, w, c)."""
    del rng
    subnet = subnet or self.narrowest
    row = self._trunk_row(subnet)
    x = self._prepare(images)
    x = self.stem_norm.after(self.stem, x, subnet.stem.width, row, momentum)
    x = jax.nn.relu(x)
    if self.stem_spec.pool:
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for i in range(self.gate_stage):
      x = self._run_stage(i, x, subnet, row, momentum)
    return x

  def gate_logits(self, features, momentum=None):
    """See `SlicedNetwork`."""
    return self.slim(features, momentum)

  def pooled(self, features, subnet, *, momentum=None, rng=None):
    """See `SlicedNetwork`."""
    del rng
    x = features
    for i in range(self.gate_stage, len(self.stages)):
      x = self._run_stage(i, x, subnet, subnet.index, momentum)
    return x.astype(jnp.float32).mean((1, 2))

  def _run_stage(self, stage, x, subnet, row, momentum):
    stage_slice = subnet.stages[stage]
    for block in self.stages[stage][: stage_slice.depth]:
      x = block(x, stage_slice, row, momentum)
    return x

  def cost_in_parts(self, subnet, image_size):
    """See `SlicedNetwork`."""
    stem, width = self.stem_spec, subnet.stem.width
    side = conv.output_size(image_size, stem.stride)
    trunk = subnets.conv_cost(side**2, stem.kernel_size, 3, width)
    trunk += subnets.norm_cost(width)
    side = conv.output_size(side, 2) if stem.pool else side
    branch = subnets.Cost()
    for i, (spec, stage) in enumerate(
      zip(self.specs, subnet.stages, strict=True)
    ):
      for j in range(stage.depth):
        reduced = gate.reduced_width(spec.inner[-1])
        stride = spec.stride if j == 0 else 1
        block = _block_cost(side, stride, width, stage, reduced, j == 0)
        if i < self.gate_stage:
          trunk += block
        else:
          branch += block
        side, width = conv.output_size(side, stride), stage.width
    branch += subnets.pool_cost(side**2, width)
    return trunk, branch + subnets.dense_cost(width, self.num_classes)

  def _channel_groups(self):
    stream = [*channels.outputs('stem'), *channels.norm('stem_norm')]
    width = self.stem_spec.widths[-1]
    for i, stage in enumerate(self.stages):
      if i == self.gate_stage:
        stream += channels.slimming_gate(
          self, width, self._narrowest_before_gate()
        )
      first = f'stages/{i}/0'
      yield [
        *stream,
        *channels.inputs(f'{first}/reduce'),
        *channels.inputs(f'{first}/projection'),
      ]
      stream = []
      for j in range(len(stage)):
        block = f'stages/{i}/{j}'
        yield from _bottleneck_groups(block)
        stream += [] if j == 0 else channels.inputs(f'{block}/reduce')
        for layer in ('expand', 'projection'):
          stream += channels.outputs(f'{block}/{layer}')
          stream += channels.norm(f'{block}/{layer}_norm')
      width = self.specs[i].widths[-1]
    yield [*stream, *channels.inputs('classifier')]


def _bottleneck_groups(block):
  yield [
    *channels.outputs(f'{block}/reduce'),
    *channels.norm(f'{block}/reduce_norm'),
    *channels.inputs(f'{block}/spatial'),
  ]
  yield [
    *channels.outputs(f'{block}/spatial'),
    *channels.norm(f'{block}/spatial_norm'),
    *channels.attention(f'{block}/gate'),
    *channels.inputs(f'{block}/expand'),
  ]


def _block_cost(side_in, stride, width_in, stage, reduced, has_projection):
  area_in, area = side_in**2, conv.output_size(side_in, stride) ** 2
  inner, width = stage.inner, stage.width
  total = (
    subnets.conv_cost(area_in, 1, width_in, inner)
    + subnets.norm_cost(inner)
    + subnets.conv_cost(area, 3, inner, inner)
    + subnets.norm_cost(inner)
    + subnets.pool_cost(area, inner)
    + subnets.dense_cost(inner, reduced)
    + subnets.dense_cost(reduced, inner)
    + subnets.conv_cost(area, 1, inner, width)
    + subnets.norm_cost(width)
  )
  if has_projection:
    total += subnets.conv_cost(area, 1, width_in, width)
    total += subnets.norm_cost(width)
  return total
