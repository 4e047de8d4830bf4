"""Channels in the order of their importance, the network otherwise the same.

A slice is leading channels, so the slices of an ordinary network, whose
channels come in no order, are worth the more, the more its important channels
come first (compare Cai et al., "Once for all", 2019, section 3.3).
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds_jax import config, models, validation
from ds_jax.convert import loading


def sort_channels(model: nnx.Module, by: str = 'norm_scale') -> nnx.Module:
  """Permutes every group of channels, the most important first.

  The widest network computes what it did; narrower ones read other channels,
  so of a trained supernet they would be worth nothing.

  Args:
    model: a model with weights; it is not changed.
    by: `l1`, the sum of a channel's |weights| in the kernels that make it; or
      `norm_scale`, the sum of its |scale| in the norms, where the group has
      one, and else as `l1`. Equal channels keep their order.

  Returns:
    A model with permuted arrays.

  Raises:
    ValueError: for another `by`.
  """
  validation.check_choice('by', by, config.IMPORTANCES)
  arrays = {p: np.asarray(a) for p, a in loading.flat_arrays(model).items()}
  for group in model.channel_groups():
    sizes = [_num_channels(arrays, member) for member in group]
    order = _order(_importances(arrays, group, by, max(sizes)), sizes)
    for member, size in zip(group, sizes, strict=True):
      arrays[member.path] = _permute(arrays[member.path], member, order[:size])
  return loading.with_arrays(
    model, {path: jnp.asarray(array) for path, array in arrays.items()}
  )


def _importances(arrays, group, by, size) -> np.ndarray:
  members = [
    m
    for m in group
    if m.path.endswith('/scale') and not models.is_slimming(m.path)
  ]
  if by == 'l1' or not members:
    members = [m for m in group if m.produces]
  total = np.zeros(size)
  for member in members:
    weights = np.abs(_split(arrays[member.path], member), dtype=np.float64)
    channel = member.axis % arrays[member.path].ndim + 1
    others = tuple(i for i in range(weights.ndim) if i != channel)
    found = weights.sum(others)
    total[: len(found)] += found
  return total


def _order(importances: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Sorts within parts: a narrower member must hold the same channels after."""
  ends = sorted(set(sizes))
  return np.concatenate(
    [
      start + np.argsort(-importances[start:end], kind='stable')
      for start, end in itertools.pairwise([0, *ends])
    ]
  )


def _permute(array, member, order) -> np.ndarray:
  channel = member.axis % array.ndim + 1
  return _split(array, member).take(order, channel).reshape(array.shape)


def _split(array, member) -> np.ndarray:
  """Splits a member's axis into (repeats, channels, width)."""
  axis = member.axis % array.ndim
  return array.reshape(
    *array.shape[:axis],
    member.repeats,
    -1,
    member.width,
    *array.shape[axis + 1 :],
  )


def _num_channels(arrays, member) -> int:
  length = arrays[member.path].shape[member.axis]
  return length // (member.repeats * member.width)
