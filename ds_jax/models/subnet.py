"""Sub-networks as values, the routing space, and what a sub-network costs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class StageSlice:
  """The slices one stage runs at; None where the family has no such slice.

  Attributes:
    width: output channels of every block, or the active part of a ViT's
      embedding.
    kernel: side of the depthwise kernels.
    inner: channels inside a bottleneck.
    heads: of attention.
    hidden: units of the two-layer perceptrons.
    depth: how many of the stage's blocks run.
  """

  width: int
  kernel: int | None = None
  inner: int | None = None
  heads: int | None = None
  hidden: int | None = None
  depth: int | None = None

  def __str__(self) -> str:
    """Short, for tables: `256 inner=64 depth=3`."""
    return ' '.join(
      str(value) if name == 'width' else f'{name}={value}'
      for name, value in dataclasses.asdict(self).items()
      if value is not None
    )


@dataclasses.dataclass(frozen=True)
class Subnet:
  """Which slice each stage uses; hashable, so a static argument under jit.

  Attributes:
    index: its place among the model's sub-networks, cheapest first.
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


class SliceLists(Protocol):
  """What a family says of one stage: slice lists, and what isn't sliced."""

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice lists, by the field of `StageSlice` that they are of."""


def check_lists(spec: SliceLists) -> None:
  """Raises ValueError unless every slice list is whole and in order."""
  for name, values in spec.lists.items():
    if not values or list(values) != sorted(values) or values[0] < 1:
      raise ValueError(
        f'Slice list {name}={values}: expected one or more positive numbers,'
        ' narrowest first.'
      )


def routing_space(
  stem: SliceLists,
  stages: Sequence[SliceLists],
  gate_stage: int,
  in_trunk: Sequence[str] = (),
) -> tuple[tuple[Subnet, ...], Subnet]:
  """Returns those that may be buckets, cheapest first, and the widest.

  Before the gate, in the trunk, every bucket takes the first slice of each
  list and the widest network the last. From the gated stage on, a list has K
  entries and bucket k takes the k-th, or it has one entry for all.

  Args:
    stem: its slice lists.
    stages: their slice lists.
    gate_stage: the index of the first stage that is not all trunk.
    in_trunk: fields of the gated stage's slices that its first block has in
      the trunk already.

  Raises:
    ValueError: if the lists do not make a routing space.
  """
  if not 0 <= gate_stage < len(stages):
    raise ValueError(
      f'gate_stage={gate_stage} is not one of the {len(stages)} stages.'
    )
  num_buckets = _num_buckets(stages[gate_stage:], gate_stage)
  trunk = [stem.lists, *(s.lists for s in stages[:gate_stage])]
  branch = [s.lists for s in stages[gate_stage:]]

  def subnet(index, trunk_index, branch_index):
    slices = [_slice(lists, trunk_index) for lists in trunk]
    slices += [_slice(lists, branch_index) for lists in branch]
    return Subnet(index, slices[0], tuple(slices[1:]))

  buckets = tuple(subnet(k, 0, k) for k in range(num_buckets))
  if len({(b.stem, b.stages) for b in buckets}) < num_buckets:
    raise ValueError(f'Two of these {num_buckets} buckets are alike: {buckets}')
  shared = [values for lists in trunk for values in lists.values()]
  shared += [branch[0][name] for name in in_trunk]
  if all(values[0] == values[-1] for values in shared):
    return buckets, buckets[-1]
  return buckets, subnet(num_buckets, -1, -1)


def chosen(
  sharing_trunk: tuple[Subnet, ...], gate_buckets: Sequence[int] | None
) -> tuple[Subnet, ...]:
  """Returns the routing space: the sub-networks that a gate chooses from.

  Args:
    sharing_trunk: those that it can choose from.
    gate_buckets: the indices of some; None means all.

  Raises:
    ValueError: unless these are two or more, rising.
  """
  if gate_buckets is None:
    return sharing_trunk
  known = [s.index for s in sharing_trunk if s.index in gate_buckets]
  if len(known) < 2 or list(gate_buckets) != known:
    raise ValueError(
      f'gate_buckets={tuple(gate_buckets)}: expected two or more of the'
      f' sub-networks 0 to {len(sharing_trunk) - 1}, rising.'
    )
  return tuple(sharing_trunk[index] for index in known)


def _num_buckets(stages, first) -> int:
  lengths = {len(v) for s in stages for v in s.lists.values()} - {1}
  if len(lengths) != 1:
    described = '; '.join(
      f'stage {i}: ' + ', '.join(f'{n}={v}' for n, v in s.lists.items())
      for i, s in enumerate(stages, first)
    )
    raise ValueError(
      'From the gated stage on, every slice list needs one entry a bucket, or'
      f' one for all; got {described}.'
    )
  return lengths.pop()


def _slice(lists, index) -> StageSlice:
  return StageSlice(
    **{
      name: values[index if len(values) > 1 else 0]
      for name, values in lists.items()
    }
  )


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one image costs, in exact integers.

  Attributes:
    madds: multiply-adds of convolutions, attention layers, dense layers and
      attention products, plus C * H * W for each average pool; no norm, no
      activation, no slimming head.
    params: weights, biases, embeddings and norm affines that the sub-network
      reads; no running statistics, no slimming head.
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


def dense_cost(width_in: int, width: int, times: int = 1) -> Cost:
  """A dense layer with bias, applied `times`; the bias is no multiply-add."""
  return Cost(times * width_in * width, width_in * width + width)


def attention_cost(tokens: int, width: int) -> Cost:
  """Queries times keys, and weights times values, in all heads together."""
  return Cost(2 * tokens**2 * width, 0)


def pool_cost(area: int, width: int) -> Cost:
  """A global average pool."""
  return Cost(area * width, 0)


def norm_cost(width: int) -> Cost:
  """A norm's scale and bias."""
  return Cost(0, 2 * width)
