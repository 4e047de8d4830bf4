"""What our arrays are made of, by name, and loading them.

Axes: T tokens, D embedding, C channels, R rows of statistics; PyTorch's kernels
are OIHW, ours HWIO, and dense ones OI and IO.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from ds_jax import models

# Of batch norms, and of torch.optim.swa_utils.AveragedModel.
_COUNTERS = ('num_batches_tracked', 'n_averaged')


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our arrays comes from.

  Attributes:
    names: the source's arrays.
    shapes: the shape each must have.
    assemble: makes our array of theirs, which it gets as a list.
  """

  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  assemble: Callable[[list[np.ndarray]], np.ndarray]


def load(
  state: Mapping[str, Any],
  model: nnx.Module,
  source_of: Callable[[str, tuple[int, ...]], Source | None],
  classifier: str,
) -> nnx.Module:
  """Loads a state into a model.

  A classifier of other classes, or none, leaves the model its own, with a
  warning.

  Args:
    state: the source's names to arrays.
    model: what to load into; it is not changed.
    source_of: takes one of our paths, and the shape of our array for the
      source's number of classes, to its `Source`; None lets the model keep its
      own array.
    classifier: the name of an array in the state with one row a class.

  Returns:
    A model with these arrays.

  Raises:
    ValueError: that lists every missing, unknown and misshapen name, or every
      array with numbers that are not finite; or if the model is to keep arrays
      of its own and is abstract.
  """
  own = flat_arrays(model)
  classes = (
    state[classifier].shape[0] if classifier in state else model.num_classes
  )
  shapes = {
    path: (*a.shape[:-1], classes) if _is_classifier(path) else a.shape
    for path, a in own.items()
  }
  sources = {path: source_of(path, shape) for path, shape in shapes.items()}
  sources = {path: s for path, s in sources.items() if s is not None}
  sources = _without_absent_classifier(state, sources)
  _check_names(state, sources)
  _check_finite(state, sources)
  arrays = {
    path: jnp.asarray(s.assemble([_to_numpy(state[n]) for n in s.names]))
    for path, s in sources.items()
    if not _is_classifier(path) or classes == model.num_classes
  }
  if classes != model.num_classes:
    logging.warning(
      'The weights are of %d classes and the model of %d: its classifier stays'
      ' as it is, untrained.',
      classes,
      model.num_classes,
    )
  _check_concrete(own, arrays)
  return with_arrays(model, {**own, **arrays})


def flat_arrays(model: nnx.Module) -> models.Arrays:
  """Returns all arrays of a model, parameters and statistics, by path."""
  variables = models.variables_of(model)
  return {**variables.params, **variables.batch_stats}


def with_arrays(model: nnx.Module, arrays: models.Arrays) -> nnx.Module:
  """Returns the model with other arrays, those of `flat_arrays`."""
  old = models.variables_of(model)
  return models.Architecture(model).bind(
    models.Variables(
      {path: arrays[path] for path in old.params},
      {path: arrays[path] for path in old.batch_stats},
    )
  )


def check_family(model: nnx.Module, family: type, weights: str) -> None:
  """Raises ValueError unless the model is of the family."""
  if not isinstance(model, family):
    raise ValueError(
      f'{weights} fit a {family.__name__}, and the model is a'
      f' {type(model).__name__}; choose another model or other weights.'
    )


def matches(state: Mapping[str, Any], pattern: str) -> bool:
  """Whether names of the state have the pattern, whatever wraps the network."""
  return bool(_prefixes(state, pattern))


def plain_names(state: Mapping[str, Any], pattern: str) -> dict[str, Any]:
  """Returns a PyTorch state without what wrappers added to it.

  That is a prefix, as `module.` or `_orig_mod.`, and numbers of batches or of
  updates.

  Args:
    state: names to arrays.
    pattern: a regular expression of how some of the network's own names begin.

  Raises:
    ValueError: if it holds several such networks, under several prefixes.
  """
  prefixes = _prefixes(state, pattern)
  if len(prefixes) > 1:
    raise ValueError(
      'The weights are of several networks, under the prefixes'
      f' {", ".join(map(repr, prefixes))}: keep the names of one; of a file, as'
      f' with --state={prefixes[-1].rstrip(".")} or config.init.state.'
    )
  prefix = ''.join(prefixes)
  return {
    _unwrapped(name).removeprefix(prefix): array
    for name, array in state.items()
    if name.rpartition('.')[2] not in _COUNTERS
  }


def _prefixes(state, pattern) -> list[str]:
  """What comes before the pattern in those names that have it."""
  wrapped = re.compile(rf'((?:\w+\.)*?){pattern}')
  found = (wrapped.match(_unwrapped(name)) for name in state)
  return sorted({match[1] for match in found if match})


def _unwrapped(name: str) -> str:
  """Returns a name without what wrappers of its parts put between.

  Those are private names, as `_orig_mod` of a block compiled by itself.
  """
  return re.sub(r'(?<![^.])_\w*\.', '', name)


def only(arrays: list[np.ndarray]) -> np.ndarray:
  """Returns the one array."""
  (array,) = arrays
  return array


def torch_source(name: str, leaf: str, shape: tuple[int, ...]) -> Source:
  """Returns the source of an array of a layer that PyTorch has, too.

  Args:
    name: PyTorch's name of the layer.
    leaf: our name of the array in its layer.
    shape: our array's. Statistics (R, C) take PyTorch's for every row.
  """
  if leaf == 'kernel' and len(shape) == 4:
    theirs = (shape[3], shape[2], shape[0], shape[1])
    return Source(
      (f'{name}.weight',), (theirs,), lambda w: only(w).transpose(2, 3, 1, 0)
    )
  if leaf == 'kernel':
    return Source((f'{name}.weight',), (shape[::-1],), lambda w: only(w).T)
  if leaf in ('mean', 'variance'):
    kind = 'running_mean' if leaf == 'mean' else 'running_var'
    return Source(
      (f'{name}.{kind}',),
      (shape[1:],),
      lambda rows: np.broadcast_to(only(rows), shape),
    )
  kind = 'weight' if leaf == 'scale' else 'bias'
  return Source((f'{name}.{kind}',), (shape,), only)


def position_source(
  name: str, found: tuple[int, ...], shape: tuple[int, int], prefix: int
) -> Source:
  """Returns the source of a position embedding, resized where it must be.

  Args:
    name: of the source's array.
    found: its shape, (T', D) or (1, T', D).
    shape: our array's, (T, D).
    prefix: how many tokens of a class come before those of the patches.
  """
  tokens = found[-2] if len(found) > 1 else 0
  if not _is_square(tokens - prefix):
    tokens = shape[0]
  theirs = (*found[:-2], tokens, shape[1])
  return Source(
    (name,),
    (theirs,),
    lambda a: _resize_position(only(a).reshape(theirs[-2:]), shape[0], prefix),
  )


def _resize_position(
  position: np.ndarray, num_tokens: int, prefix: int
) -> np.ndarray:
  """Takes (T', D) to (T, D): the patches' square grid bicubically."""
  if len(position) == num_tokens:
    return position
  old, new = (math.isqrt(n - prefix) for n in (len(position), num_tokens))
  logging.warning(
    'The position embedding is resized from %d x %d to %d x %d patches.',
    old,
    old,
    new,
    new,
  )
  width = position.shape[1]
  grid = position[prefix:].reshape(old, old, width)
  grid = jax.image.resize(grid, (new, new, width), 'cubic')
  return np.concatenate([position[:prefix], grid.reshape(-1, width)])


def _is_square(number: int) -> bool:
  return number > 0 and math.isqrt(number) ** 2 == number


def _is_classifier(path: str) -> bool:
  return path.startswith('classifier/')


def _without_absent_classifier(state, sources):
  names = [n for p, s in sources.items() if _is_classifier(p) for n in s.names]
  if any(name in state for name in names):
    return sources
  logging.warning(
    'The weights have no classifier (%s): that of the model stays as it is,'
    ' untrained.',
    ', '.join(names),
  )
  return {p: s for p, s in sources.items() if not _is_classifier(p)}


def _check_names(state, sources):
  wanted = {
    name: shape
    for source in sources.values()
    for name, shape in zip(source.names, source.shapes, strict=True)
  }
  problems = [f'missing: {n} {wanted[n]}' for n in wanted if n not in state]
  problems += [f'unknown: {n}' for n in state if n not in wanted]
  problems += [
    f'shape of {n}: {tuple(state[n].shape)}, expected {wanted[n]}'
    for n in wanted
    if n in state and tuple(state[n].shape) != wanted[n]
  ]
  if problems:
    raise ValueError(
      'These weights do not fit the model (are its depths and widths those of'
      ' the checkpoint?):\n  ' + '\n  '.join(problems)
    )


def _check_finite(state, sources):
  names = {name for source in sources.values() for name in source.names}
  counts = {n: int((~np.isfinite(_to_numpy(state[n]))).sum()) for n in names}
  broken = [f'{n}: {count}' for n, count in sorted(counts.items()) if count]
  if broken:
    raise ValueError(
      'These weights have numbers that are infinite or NaN, as of a training'
      ' that diverged; take an earlier checkpoint of it:\n  '
      + '\n  '.join(broken)
    )


def _check_concrete(own, arrays):
  absent = [
    path
    for path, array in own.items()
    if path not in arrays and isinstance(array, jax.ShapeDtypeStruct)
  ]
  if absent:
    raise ValueError(
      f'The model is to keep its own {absent}, but an abstract one has none:'
      ' make it with create_model.'
    )


def _to_numpy(array) -> np.ndarray:
  if hasattr(array, 'detach'):
    # NumPy has no bfloat16 of its own for PyTorch to give.
    array = array.detach().cpu().float().numpy()
  return np.asarray(array, np.float32)
