"""A model as code and plain dicts of arrays.

Training, checkpoints and routing hold a network's arrays in two flat dicts,
`{'stages/3/0/pointwise/kernel': array, ...}`: parameters and batch statistics.
`Architecture` is the rest of the model, and puts the two together again inside
a jitted function.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

Arrays = dict[str, jax.Array]


@flax.struct.dataclass
class Variables:
  """A network's arrays.

  Attributes:
    params: what is trained, by path.
    batch_stats: running statistics of batch norms, by path.
  """

  params: Arrays
  batch_stats: Arrays


class Architecture:
  """A model without its arrays."""

  def __init__(self, model: nnx.Module):
    self._graph, params, batch_stats = nnx.split(
      model, nnx.Param, nnx.BatchStat
    )
    self._params = _Layout(params)
    self._batch_stats = _Layout(batch_stats)

  def bind(self, variables: Variables) -> Any:
    """Returns the model with these arrays; no array is copied.

    Raises:
      ValueError: if names are missing or unknown.
    """
    return nnx.merge(
      self._graph,
      self._params.nest(variables.params),
      self._batch_stats.nest(variables.batch_stats),
    )


def variables_of(model: nnx.Module) -> Variables:
  """Returns a model's arrays."""
  _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return Variables(
    _Layout(params).flatten(params), _Layout(batch_stats).flatten(batch_stats)
  )


def variables_from(tree: Mapping[str, Mapping[str, Any]]) -> Variables:
  """Returns the arrays of a checkpoint, where kinds without any are absent."""
  return Variables(
    **{
      field.name: {
        path: jnp.asarray(x) for path, x in tree.get(field.name, {}).items()
      }
      for field in dataclasses.fields(Variables)
    }
  )


def is_slimming(path: str) -> bool:
  """Whether a parameter belongs to the slimming head, Stage II's alone."""
  return 'slim' in path.split('/')


class _Layout:
  """The order and the nesting of a state's arrays."""

  def __init__(self, state: nnx.State):
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(
      nnx.to_pure_dict(state)
    )
    self._names = [_path_name(path) for path, _ in leaves]

  def flatten(self, state: nnx.State) -> Arrays:
    leaves = jax.tree.leaves(nnx.to_pure_dict(state))
    return dict(zip(self._names, leaves, strict=True))

  def nest(self, flat: Arrays) -> Any:
    names = set(self._names)
    if flat.keys() != names:
      missing = sorted(names - flat.keys())
      unknown = sorted(flat.keys() - names)
      raise ValueError(
        f'These arrays are not this model: missing {missing}, unknown'
        f' {unknown}.'
      )
    return jax.tree.unflatten(self._treedef, [flat[n] for n in self._names])


def _path_name(path) -> str:
  return '/'.join(str(entry.key) for entry in path)
