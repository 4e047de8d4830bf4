"""Another checkpoint of ds_jax as the start of a finetuning."""

import functools

import numpy as np
from absl import logging
from flax import nnx

from ds_jax import models
from ds_jax.convert import loading


def from_network(variables: models.Variables, model: nnx.Module) -> nnx.Module:
  """Loads the arrays of a network of the same family and sizes.

  What may differ: the number of classes, which leaves the model its classifier;
  the number of tokens, whose positions are resized; the slimming head, which
  then stays the model's own; and the buckets: a bucket's statistics are those
  at its index, or the last ones, and the widest's are the widest's.

  Args:
    variables: the other network's arrays, for example
      `models.variables_from(checkpoint.restore(directory).tree['network'])`.
    model: what to load into; it is not changed.

  Returns:
    A model with these arrays.

  Raises:
    ValueError: that lists every path that differs otherwise.
  """
  own = loading.flat_arrays(model)
  state = {**variables.params, **variables.batch_stats}
  kept = [
    path
    for path in own
    if models.is_slimming(path)
    and (path not in state or state[path].shape != own[path].shape)
  ]
  if kept:
    logging.warning(
      'The slimming head is another: the model keeps its own %s.', kept
    )
  state = {
    path: array
    for path, array in state.items()
    if not models.is_slimming(path) or (path in own and path not in kept)
  }
  return loading.load(
    state,
    model,
    functools.partial(_source_of, state, variables.batch_stats, model),
    'classifier/bias',
  )


def _source_of(state, batch_stats, model, path, shape):
  if models.is_slimming(path) and path not in state:
    return None
  if path == 'position' and path in state:
    prefix = 'class_token' in state
    return loading.position_source(path, state[path].shape, shape, int(prefix))
  if path in batch_stats:
    return _statistics_source(path, len(batch_stats[path]), shape)
  return loading.Source((path,), (shape,), loading.only)


def _statistics_source(path, rows, shape):
  taken = [min(row, rows - 1) for row in range(shape[0] - 1)] + [rows - 1]
  return loading.Source(
    (path,),
    ((rows, *shape[1:]),),
    lambda a: np.asarray(loading.only(a))[taken],
  )
