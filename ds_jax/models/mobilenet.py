"""DS-MobileNet: MobileNetV1 blocks with attention, sliced in width and kernel.

Axes: N batch, H, W, C channels, K buckets.

Depthwise, batch norm, swish, attention, pointwise, batch norm, swish; no skips;
global average pool and one classifier (DS-Net, section 4; the widths are those
of the authors' release). Everything before the attention of the gated stage's
first block is the trunk, and runs at the narrowest slices for every bucket;
bucket k runs the rest at its k-th slices. In DS-MobileNet++ a smaller depthwise
kernel is the centre of the full one.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx

from ds_jax import nn, validation
from ds_jax.models import base, channels
from ds_jax.models import subnet as subnets
from ds_jax.nn import activation, conv, gate

_STEM_STRIDE = 2
_STEM_KERNEL_SIZE = 3


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """The shape of one stage.

  Attributes:
    widths: slice list of the output channels, narrowest first.
    kernels: slice list of the depthwise kernels' sides.
    depth: how many blocks.
    stride: of the first block.
  """

  widths: tuple[int, ...]
  kernels: tuple[int, ...] = (3,)
  depth: int = 1
  stride: int = 1

  def __post_init__(self):
    object.__setattr__(self, 'widths', tuple(self.widths))
    object.__setattr__(self, 'kernels', tuple(self.kernels))
    subnets.check_lists(self)
    if any(k % 2 == 0 for k in self.kernels):
      raise ValueError(f'Kernels {self.kernels} must be odd.')
    if self.depth < 1 or self.stride not in (1, 2):
      raise ValueError(
        f'A stage needs depth >= 1 and stride 1 or 2, got {self.depth} and'
        f' {self.stride}.'
      )

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice lists, by the field of `StageSlice` that they are of."""
    return {'width': self.widths, 'kernel': self.kernels}


class SeparableBlock(nnx.Module):
  """Depthwise and pointwise convolution with attention between them."""

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    kernel_size: int,
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
      kernel_size: the largest, of the depthwise convolution.
      stride: of the depthwise convolution.
      rows_in: rows of statistics of the norm after the depthwise convolution.
      rows: rows of statistics of the norm after the pointwise convolution.
      num_buckets: K where the slimming head is shared, None elsewhere.
      reduced: the width of the attention's and gate's shared reduction.
      rngs: the stream `params` initialises the weights.
    """
    self.depthwise = nn.SlicedDepthwiseConv(
      in_features, kernel_size, stride=stride, rngs=rngs
    )
    self.depthwise_norm = nn.SlicedBatchNorm(in_features, rows_in)
    self.gate = nn.DoubleHeadedGate(
      in_features, num_buckets, reduced=reduced, rngs=rngs
    )
    self.pointwise = nn.SlicedDense(
      in_features, features, use_bias=False, rngs=rngs
    )
    self.pointwise_norm = nn.SlicedBatchNorm(features, rows)

  def extract(self, x, kernel_size, row, momentum=None):
    """The part before the attention: depthwise, norm, swish."""
    x = self.depthwise_norm.after(self.depthwise, x, kernel_size, row, momentum)
    return activation.swish(x)

  def project(self, x, features, row, momentum=None):
    """The part from the attention on: attention, pointwise, norm, swish."""
    x = self.gate.attention(x)
    x = self.pointwise_norm.after(self.pointwise, x, features, row, momentum)
    return activation.swish(x)


class MobileNet(base.SlicedNetwork):
  """The supernet of separable blocks."""

  def __init__(
    self,
    *,
    num_classes: int,
    stem_widths: Sequence[int],
    stages: Sequence[StageSpec | Mapping],
    gate_stage: int,
    gate_buckets: Sequence[int] | None = None,
    gate_head: str = 'shared',
    gate_width: int | None = None,
    gate_hidden: Sequence[int] = (64, 64),
    gate_pooling: str = 'mean_max_std',
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
        it on, every slice list has K entries, or one for all buckets.
      gate_buckets: the sub-networks that the gate chooses from, two or more
        of the indices 0 to K - 1, rising; None means all K.
      gate_head: `shared`, as published: a linear slimming head on the
        reduction of the gated block's attention; or `own`: a `SlimmingGate`,
        beside the attention.
      gate_width: of the reduction of the gated block's attention. None means a
        quarter of the block's input, as published, which is few for a `shared`
        head to decide by in a narrow network.
      gate_hidden: units of an `own` head's hidden layers; none makes it linear.
      gate_pooling: what an `own` head reads; see `SlimmingGate`.
      dropout_rate: before the classifier, where a call brings an `rng`.
      dtype: what activations are computed in, `float32` or `bfloat16`.
      rngs: the stream `params` initialises the weights.

    Raises:
      ValueError: if the stages do not make a routing space.
    """
    validation.check_choice('gate_head', gate_head, ('shared', 'own'))
    stem = StageSpec(tuple(stem_widths))
    stages = tuple(
      s if isinstance(s, StageSpec) else StageSpec(**s) for s in stages
    )
    super().__init__(
      # The gated block's depthwise convolution is in the trunk.
      *subnets.routing_space(stem, stages, gate_stage, in_trunk=('kernel',)),
      num_classes=num_classes,
      gate_buckets=gate_buckets,
      dropout_rate=dropout_rate,
      dtype=dtype,
    )
    self.specs = (stem, *stages)
    self.gate_stage = gate_stage
    self._gate_head, self._gate_width = gate_head, gate_width

    self.stem = nn.SlicedConv(
      3, stem.widths[-1], _STEM_KERNEL_SIZE, stride=_STEM_STRIDE, rngs=rngs
    )
    self.stem_norm = nn.SlicedBatchNorm(stem.widths[-1], self._trunk_rows)
    self.stages = nnx.List(
      [self._make_stage(i, rngs) for i in range(len(stages))]
    )
    self.classifier = nn.SlicedDense(
      stages[-1].widths[-1], num_classes, rngs=rngs
    )
    before = [self.narrowest.stem, *self.narrowest.stages][gate_stage]
    self.slim = (
      nn.SlimmingGate(
        before.width,
        len(self.routing_space),
        hidden=gate_hidden,
        pooling=gate_pooling,
        rngs=rngs,
      )
      if gate_head == 'own'
      else None
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
      holds_gate = gated and self._gate_head == 'shared'
      block = SeparableBlock(
        width_in,
        spec.widths[-1],
        kernel_size=spec.kernels[-1],
        stride=spec.stride if j == 0 else 1,
        rows_in=self._trunk_rows if gated else rows,
        rows=rows,
        num_buckets=len(self.routing_space) if holds_gate else None,
        reduced=self._reduced_width(stage, j, width_in),
        rngs=rngs,
      )
      blocks.append(block)
      width_in = spec.widths[-1]
    return blocks

  def trunk(self, images, subnet=None, *, momentum=None, rng=None):
    """See `SlicedNetwork`; returns (N, h, w, c)."""
    del rng
    subnet = subnet or self.narrowest
    row = self._trunk_row(subnet)
    x = self._prepare(images)
    x = self.stem_norm.after(self.stem, x, subnet.stem.width, row, momentum)
    x = activation.swish(x)
    for i in range(self.gate_stage):
      for block in self.stages[i]:
        x = block.extract(x, subnet.stages[i].kernel, row, momentum)
        x = block.project(x, subnet.stages[i].width, row, momentum)
    kernel_size = self._gate_kernel(subnet)
    return self.stages[self.gate_stage][0].extract(
      x, kernel_size, row, momentum
    )

  def gate_logits(self, features, momentum=None):
    """See `SlicedNetwork`."""
    if self.slim is not None:
      return self.slim(features, momentum)
    return self.stages[self.gate_stage][0].gate.logits(features)

  def pooled(self, features, subnet, *, momentum=None, rng=None):
    """See `SlicedNetwork`."""
    del rng
    x, row = features, subnet.index
    for i in range(self.gate_stage, len(self.stages)):
      for j, block in enumerate(self.stages[i]):
        if i > self.gate_stage or j > 0:
          x = block.extract(x, subnet.stages[i].kernel, row, momentum)
        x = block.project(x, subnet.stages[i].width, row, momentum)
    return x.astype(jnp.float32).mean((1, 2))

  def cost_in_parts(self, subnet, image_size):
    """See `SlicedNetwork`."""
    side = conv.output_size(image_size, _STEM_STRIDE)
    width = subnet.stem.width
    trunk = subnets.conv_cost(side**2, _STEM_KERNEL_SIZE, 3, width)
    trunk += subnets.norm_cost(width)
    branch = subnets.Cost()
    full_in = self.specs[0].widths[-1]
    for i, stage in enumerate(subnet.stages):
      spec = self.specs[1 + i]
      for j in range(spec.depth):
        side = conv.output_size(side, spec.stride if j == 0 else 1)
        gated = (i, j) == (self.gate_stage, 0)
        kernel_size = self._gate_kernel(subnet) if gated else stage.kernel
        extract = _extract_cost(side**2, kernel_size, width)
        reduced = self._reduced_width(i, j, full_in)
        project = _project_cost(side**2, width, stage.width, reduced)
        if i < self.gate_stage:
          trunk += extract + project
        elif gated:
          trunk, branch = trunk + extract, branch + project
        else:
          branch += extract + project
        width, full_in = stage.width, spec.widths[-1]
    branch += subnets.pool_cost(side**2, width)
    return trunk, branch + subnets.dense_cost(width, self.num_classes)

  def _channel_groups(self):
    # Without skips, each block's output is a group of its own.
    group = [*channels.outputs('stem'), *channels.norm('stem_norm')]
    width = self.specs[self.gate_stage].widths[-1]
    for block in self._blocks():
      if block == f'stages/{self.gate_stage}/0':
        group += channels.slimming_gate(
          self, width, self._narrowest_before_gate()
        )
      group += [
        channels.Member(f'{block}/depthwise/kernel', -1),
        *channels.norm(f'{block}/depthwise_norm'),
        *channels.attention(f'{block}/gate'),
        *channels.inputs(f'{block}/pointwise'),
      ]
      yield group
      group = [
        *channels.outputs(f'{block}/pointwise'),
        *channels.norm(f'{block}/pointwise_norm'),
      ]
    yield [*group, *channels.inputs('classifier')]

  def _reduced_width(self, stage: int, block: int, full_in: int) -> int:
    if self._gate_width and (stage, block) == (self.gate_stage, 0):
      return self._gate_width
    return gate.reduced_width(full_in)

  def _gate_kernel(self, subnet: subnets.Subnet) -> int:
    """The gated block's depthwise kernel, the same for every bucket."""
    kernels = self.specs[1 + self.gate_stage].kernels
    return kernels[0 if self.shares_trunk(subnet) else -1]


def _extract_cost(area, kernel_size, width) -> subnets.Cost:
  return subnets.depthwise_cost(area, kernel_size, width) + subnets.norm_cost(
    width
  )


def _project_cost(area, width_in, width, reduced) -> subnets.Cost:
  return (
    subnets.pool_cost(area, width_in)
    + subnets.dense_cost(width_in, reduced)
    + subnets.dense_cost(reduced, width_in)
    + subnets.conv_cost(area, 1, width_in, width)
    + subnets.norm_cost(width)
  )
