"""Channel groups: which axes of which arrays are over the same channels.

One permutation of all axes of a group leaves the widest network's function as
it is. Every axis that is sliced is in a group.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from flax import nnx

from ds_jax.models import functional, mobilenet, resnet, vit


@dataclasses.dataclass(frozen=True)
class Member:
  """One axis of one array.

  The axis is as long as `repeats` times the channels times `width`, in that
  order; a narrower array has the group's leading channels.

  Attributes:
    path: of the array.
    axis: counted from the end: -1 or -2.
    width: entries of one channel, side by side, as of a head of attention.
    repeats: how often all channels come, as in a pooled concatenation.
    produces: whether the array is a kernel that makes the channels.
  """

  path: str
  axis: int
  width: int = 1
  repeats: int = 1
  produces: bool = False


Group = tuple[Member, ...]


def channel_groups(model: nnx.Module) -> list[Group]:
  """Returns a model's channel groups.

  A gate that reads the trunk's narrowest slice only is in none: after a
  permutation that slice holds other channels.

  Raises:
    ValueError: if the model is of no family known here.
  """
  families = {
    mobilenet.MobileNet: _mobilenet_groups,
    resnet.ResNet: _resnet_groups,
    vit.VisionTransformer: _vit_groups,
  }
  for family, groups in families.items():
    if isinstance(model, family):
      # The families name more than each model's layers have.
      variables = functional.variables_of(model)
      paths = variables.params.keys() | variables.batch_stats.keys()
      return [tuple(m for m in g if m.path in paths) for g in groups(model)]
  raise ValueError(
    f'The channels of a {type(model).__name__} are not known; expected a'
    f' {", ".join(family.__name__ for family in families)}.'
  )


def _mobilenet_groups(model) -> Iterator[Iterable[Member]]:
  # Without skips, each block's output is a group of its own.
  group = [*_outputs('stem'), *_norm('stem_norm')]
  width = model.specs[model.gate_stage].widths[-1]
  for block in _blocks(model):
    if block == f'stages/{model.gate_stage}/0':
      group += _slimming_gate(model, width, _trunk_width(model))
    group += [
      Member(f'{block}/depthwise/kernel', -1),
      *_norm(f'{block}/depthwise_norm'),
      *_attention(f'{block}/gate'),
      *_inputs(f'{block}/pointwise'),
    ]
    yield group
    group = [*_outputs(f'{block}/pointwise'), *_norm(f'{block}/pointwise_norm')]
  yield [*group, *_inputs('classifier')]


def _resnet_groups(model) -> Iterator[Iterable[Member]]:
  stream = [*_outputs('stem'), *_norm('stem_norm')]
  width = model.stem_spec.widths[-1]
  for i, stage in enumerate(model.stages):
    if i == model.gate_stage:
      stream += _slimming_gate(model, width, _trunk_width(model))
    first = f'stages/{i}/0'
    yield [
      *stream,
      *_inputs(f'{first}/reduce'),
      *_inputs(f'{first}/projection'),
    ]
    stream = []
    for j in range(len(stage)):
      block = f'stages/{i}/{j}'
      yield from _bottleneck_groups(block)
      stream += [] if j == 0 else _inputs(f'{block}/reduce')
      for layer in ('expand', 'projection'):
        stream += _outputs(f'{block}/{layer}')
        stream += _norm(f'{block}/{layer}_norm')
    width = model.specs[i].widths[-1]
  yield [*stream, *_inputs('classifier')]


def _bottleneck_groups(block) -> Iterator[Iterable[Member]]:
  yield [
    *_outputs(f'{block}/reduce'),
    *_norm(f'{block}/reduce_norm'),
    *_inputs(f'{block}/spatial'),
  ]
  yield [
    *_outputs(f'{block}/spatial'),
    *_norm(f'{block}/spatial_norm'),
    *_attention(f'{block}/gate'),
    *_inputs(f'{block}/expand'),
  ]


def _vit_groups(model) -> Iterator[Iterable[Member]]:
  width, idle = model.norm.scale.shape[0], model.slicing == 'idle'
  stream = [
    *_outputs('patches'),
    Member('class_token', -1),
    Member('position', -1),
    *_slimming_gate(model, width, width if idle else _trunk_width(model)),
    *_norm('norm'),
    *_inputs('classifier'),
  ]
  for block in _blocks(model):
    stream += [
      *_norm(f'{block}/attention_norm'),
      *_inputs(f'{block}/query_key_value'),
      *_outputs(f'{block}/project'),
      *_norm(f'{block}/mlp_norm'),
      *_inputs(f'{block}/expand'),
      *_outputs(f'{block}/reduce'),
    ]
    yield [
      *_outputs(f'{block}/query_key_value', 3 * model.head_dim),
      *_inputs(f'{block}/project', model.head_dim),
    ]
    yield [*_outputs(f'{block}/expand'), *_inputs(f'{block}/reduce')]
  yield stream


def _blocks(model) -> Iterator[str]:
  for i, stage in enumerate(model.stages):
    for j in range(len(stage)):
      yield f'stages/{i}/{j}'


def _outputs(layer, width=1) -> Group:
  return (
    Member(f'{layer}/kernel', -1, width, produces=True),
    Member(f'{layer}/bias', -1, width),
  )


def _inputs(layer, width=1) -> Group:
  return (Member(f'{layer}/kernel', -2, width),)


def _norm(layer) -> Group:
  leaves = ('scale', 'bias', 'mean', 'variance')
  return tuple(Member(f'{layer}/{leaf}', -1) for leaf in leaves)


def _attention(gate) -> Group:
  return (
    *_inputs(f'{gate}/reduce'),
    Member(f'{gate}/expand/kernel', -1),
    Member(f'{gate}/expand/bias', -1),
  )


def _trunk_width(model) -> int:
  """The channels of the narrowest trunk's last stage."""
  return (model.narrowest.stem, *model.narrowest.stages)[model.gate_stage].width


def _slimming_gate(model, width, read) -> Group:
  """The gate's inputs, if it reads all `width` channels."""
  if model.slim is None or read < width:
    return ()
  repeats = model.slim.norm.scale.shape[0] // width
  first = 'hidden/0' if len(model.slim.hidden) else 'head'
  return tuple(
    dataclasses.replace(member, repeats=repeats)
    for member in (*_norm('slim/norm'), *_inputs(f'slim/{first}'))
  )
