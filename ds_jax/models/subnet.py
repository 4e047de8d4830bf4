"""Sub-networks as values, and what each of them costs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class StageSlice:
  """The slices one stage runs at.

  Attributes:
    width: output channels of every block in the stage.
  """

  width: int


@dataclasses.dataclass(frozen=True)
class Subnet:
  """Which slice each stage uses; hashable, so a static argument under jit.

  Attributes:
    index: the bucket in the model's routing space; the widest network, where
      it is not itself a bucket, comes after the last one.
    stem: the stem's slice.
    stages: one slice a stage.
  """

  index: int
  stem: StageSlice
  stages: tuple[StageSlice, ...]

  @property
  def widths(self) -> tuple[int, ...]:
    """The widths of the stem and the stages, for tables."""
    return (self.stem.width, *(s.width for s in self.stages))


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one image costs, in exact integers.

  Attributes:
    madds: multiply-adds of convolutions, attention layers and dense layers,
      plus C * H * W for each average pool; no norm, no activation.
    params: weights, biases and norm affines that the sub-network reads; no
      running statistics, no slimming head.
  """

  madds: int = 0
  params: int = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(self.madds + other.madds, self.params + other.params)


def conv_cost(area: int, kernel_size: int, width_in: int, width: int) -> Cost:
  """A convolution without bias; `area` is the output's height x width."""
  params = kernel_size**2 * width_in * width
  return Cost(area * params, params)


def depthwise_cost(area: int, kernel_size: int, width: int) -> Cost:
  """A depthwise convolution without bias."""
  return conv_cost(area, kernel_size, 1, width)


def dense_cost(width_in: int, width: int) -> Cost:
  """A dense layer with bias, applied once; the bias is no multiply-add."""
  return Cost(width_in * width, width_in * width + width)


def pool_cost(area: int, width: int) -> Cost:
  """A global average pool."""
  return Cost(area * width, 0)


def norm_cost(width: int) -> Cost:
  """A norm's scale and bias."""
  return Cost(0, 2 * width)
