"""Words for channel groups: which axes of which arrays are over the same ones.

The families say with them which groups they have.
"""

import dataclasses


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


def outputs(layer: str, width: int = 1) -> Group:
  """What a layer makes: kernel and bias."""
  return (
    Member(f'{layer}/kernel', -1, width, produces=True),
    Member(f'{layer}/bias', -1, width),
  )


def inputs(layer: str, width: int = 1) -> Group:
  """What a layer reads."""
  return (Member(f'{layer}/kernel', -2, width),)


def norm(layer: str) -> Group:
  """A norm's affine, and its statistics."""
  leaves = ('scale', 'bias', 'mean', 'variance')
  return tuple(Member(f'{layer}/{leaf}', -1) for leaf in leaves)


def attention(gate: str) -> Group:
  """The channels that an attention head reads and scales."""
  return (
    *inputs(f'{gate}/reduce'),
    Member(f'{gate}/expand/kernel', -1),
    Member(f'{gate}/expand/bias', -1),
  )


def slimming_gate(model, width: int, read: int) -> Group:
  """The inputs of a `SlimmingGate`, if it reads all `width` channels."""
  if model.slim is None or read < width:
    return ()
  repeats = model.slim.norm.scale.shape[0] // width
  first = 'hidden/0' if len(model.slim.hidden) else 'head'
  return tuple(
    dataclasses.replace(member, repeats=repeats)
    for member in (*norm('slim/norm'), *inputs(f'slim/{first}'))
  )
