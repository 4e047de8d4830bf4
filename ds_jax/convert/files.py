"""Files of weights as names to arrays.

A file of PyTorch may hold several states, such as the weights and their moving
average, and a training script's arguments beside them.
"""

import argparse
import codecs
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from ds_jax import paths

State = Mapping[str, Any]

# A moving average is what its authors would evaluate.
_AVERAGE = re.compile(r'(?i)(^|[_.])(ema|swa|shadow|averaged?)($|[_.])')
_PLAIN = ('state_dict', 'model_state_dict', 'model', 'net', 'network')
# How deep states lie in dicts.
_MAX_DEPTH = 3

# Paths become those that every system can hold.
_PATHS = {
  'PosixPath': pathlib.PurePosixPath,
  'PurePosixPath': pathlib.PurePosixPath,
  'WindowsPath': pathlib.PureWindowsPath,
  'PureWindowsPath': pathlib.PureWindowsPath,
}


_PATH_MODULES = ('pathlib', 'pathlib._local')


def read(path: str, key: str | None = None) -> dict[str, Any]:
  """Reads a file of weights, arrays only, and logs which state it took.

  Args:
    path: an `.npz` or `.safetensors` file; any other is PyTorch's.
    key: which of the states in a PyTorch file. None means a moving average
      under one of its usual names, else `state_dict` or `model`, else the only
      one.

  Returns:
    Names to arrays, as in the file.

  Raises:
    ImportError: if the package that reads it is not installed.
    OSError: if there is no such file.
    ValueError: if it is damaged or holds something else, or no such state.
  """
  file = pathlib.Path(paths.expanded(path))
  if not file.exists():
    raise FileNotFoundError(
      f'There is no {path}; expected a file of weights, or the workdir of a run'
      ' or a conversion.'
    )
  if file.is_dir():
    raise IsADirectoryError(
      f'{path} is a folder without checkpoints/; expected a file of weights, or'
      ' the workdir of a run or a conversion.'
    )
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors}
  content = readers.get(file.suffix, _read_torch)(str(file))
  return choose_state(content, path, key)


def choose_state(
  content: Any, path: str, key: str | None = None
) -> dict[str, Any]:
  """Returns one of the states in a file's content.

  Args:
    content: a state, or dicts that hold some.
    path: of the file, for messages.
    key: as of `read`.

  Raises:
    ValueError: if there is no state, not this one, or none to prefer.
  """
  states = dict(_states(content))
  if not states:
    raise ValueError(
      f'{path} holds no state: expected names to arrays, or a dict of such.'
    )
  known = ', '.join(name or '(no name)' for name in states)
  if key is None:
    key = _preferred(states)
  if key not in states:
    raise ValueError(
      f'{path} holds these states: {known}. Choose one of them with --state, or'
      ' config.init.state'
      + (f'; there is no {key!r}.' if key is not None else '.')
    )
  if key:
    is_average = ', a moving average' if _AVERAGE.search(key) else ''
    # A choice among several is shown wherever warnings are.
    logging.log(
      logging.INFO if len(states) == 1 else logging.WARNING,
      '%s holds these states: %s. Took %s%s.',
      path,
      known,
      key,
      is_average,
    )
  return dict(states[key])


def _preferred(states: Mapping[str, State]) -> str | None:
  """Returns the key of the state to take; None if that is not clear."""
  averages = [name for name in states if _AVERAGE.search(name)]
  plain = [name for name in _PLAIN if name in states]
  candidates = averages or plain[:1] or list(states)
  return candidates[0] if len(candidates) == 1 else None


def _states(content, key='', depth=_MAX_DEPTH) -> Iterator[tuple[str, State]]:
  """Finds the dicts of arrays, by their keys with dots between."""
  if not isinstance(content, Mapping) or not all(
    isinstance(name, str) for name in content
  ):
    return
  inside = [
    state
    for name, value in content.items()
    if depth
    for state in _states(value, f'{key}.{name}' if key else name, depth - 1)
  ]
  arrays = {n: x for n, x in content.items() if _is_array(x)}
  # Counters and scores, which lie beside states, have no axes.
  if not inside and any(len(x.shape) > 0 for x in arrays.values()):
    yield key, arrays
  yield from inside


def _is_array(x) -> bool:
  return hasattr(x, 'shape') and hasattr(x, 'dtype')


def _read_torch(path: str) -> Any:
  """Reads a file of `torch.save` with PyTorch's arrays-only reader."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'Reading {path} needs PyTorch: pip install -e ".[torch]".'
    ) from error
  try:
    with torch.serialization.safe_globals(list(_harmless())):
      return torch.load(path, map_location='cpu', weights_only=True)
  except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
    refused = _refused_kind(str(error))
    if refused is None:
      raise _damaged(path, error) from error
  # Without PyTorch's message, which advises to read it unsafely.
  raise ValueError(
    f'{path} holds an object of the kind {refused}, and only arrays with plain'
    ' values beside them are read, since others can run code. Save the weights'
    ' alone, where that kind is known: torch.save(model.state_dict(), FILE).'
  )


def _harmless() -> Iterator[Any]:
  """Yields what a training script may put beside its arrays, and does no harm.

  Either a class or function, or a pair with the name that pickles have.
  """
  yield from (argparse.Namespace, np.ndarray, np.dtype)
  # As protocol 2 writes bytes.
  yield codecs.encode
  yield from (getattr(np.dtypes, name) for name in np.dtypes.__all__)
  for array in (np.float32(0), np.zeros(1)):
    make = array.__reduce__()[0]
    # A file has the name of the NumPy that wrote it.
    for package in ('core', '_core'):
      yield make, f'numpy.{package}.multiarray.{make.__name__}'
  for name, kind in _PATHS.items():
    yield from ((kind, f'{module}.{name}') for module in _PATH_MODULES)


def _refused_kind(message: str) -> str | None:
  """Returns the kind that PyTorch's reader did not allow; None if none."""
  match = re.search(r'GLOBAL ([\w.]+)', message)
  return match and match[1]


def _read_npz(path):
  try:
    # NumPy leaves the file open if it is damaged.
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise _damaged(path, error) from error


def _read_safetensors(path):
  try:
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      f'Reading {path} needs safetensors: pip install -e ".[safetensors]".'
    ) from error
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise _damaged(path, error) from error


def _damaged(path, error) -> ValueError:
  first, *_ = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).splitlines() or ['']
  return ValueError(f'{path} is damaged, or holds more than arrays: {first}')
