"""Files of weights as names to arrays.

A file of PyTorch may hold several states, such as the weights and their moving
average, and a training script's arguments beside them.
"""

import argparse
import codecs
import datetime
import pathlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from ds_jax import paths

State = Mapping[str, Any]

# A moving average is what its authors would evaluate.
_AVERAGE = re.compile(
  r'(?i)(^|[_.])(ema|swa|shadow|avg|averaged?|polyak)($|[_.])'
)
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
# Plain values, and what they are kept in.
_PLAIN_KINDS = (
  *(bool, int, float, complex, str, list, tuple, dict, set, frozenset),
  *(range, slice, argparse.Namespace, types.SimpleNamespace),
  *(datetime.date, datetime.datetime, datetime.time),
  *(datetime.timedelta, datetime.timezone),
)


def read(path: str, key: str | None = None) -> dict[str, Any]:
  """Reads a file of weights, arrays only, and logs which state it took.

  Args:
    path: an `.npz` or `.safetensors` file; any other is PyTorch's.
    key: which of the states in a PyTorch file, or the prefix of one network's
      names in a state that holds several. None means a moving average under one
      of its usual names, else `state_dict` or `model`, else the only one.

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
  with open(file, 'rb') as opened:
    content = _content(readers.get(file.suffix, _read_torch), opened)
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
  preferred = _preferred(states)
  if key is None:
    key = preferred
  if key not in states and preferred is not None:
    states |= _under_prefix(states[preferred], key)
  known = ', '.join(name or '(no name)' for name in states)
  if key not in states:
    raise ValueError(
      f'{path} holds these states: {known}. Choose one of them with --state, or'
      ' config.init.state'
      + (f'; there is no {key!r}.' if key is not None else '.')
    )
  if key:
    # A warning is shown by every command.
    logging.warning(
      '%s holds these states: %s. Took %s%s.',
      path,
      known,
      key,
      ', a moving average' if _AVERAGE.search(key) else '',
    )
  _say_passed_over(content, path)
  return dict(states[key])


def _say_passed_over(content, path):
  """Warns of averages that can't be taken, as torch_ema's lists."""
  unnamed = [key for key in _lists_of_arrays(content) if _AVERAGE.search(key)]
  if unnamed:
    logging.warning(
      '%s holds a moving average whose arrays have no names, which is passed'
      ' over: %s.',
      path,
      ', '.join(unnamed),
    )


def _under_prefix(state: State, prefix: str) -> dict[str, State]:
  """Returns the names under a prefix as a state, if there are any."""
  names = [name for name in state if name.startswith(f'{prefix}.')]
  if not names:
    return {}
  return {prefix: {n.removeprefix(f'{prefix}.'): state[n] for n in names}}


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


def _lists_of_arrays(content, key='', depth=_MAX_DEPTH) -> Iterator[str]:
  """Finds the lists of arrays, by their keys with dots between."""
  if isinstance(content, Mapping) and depth >= 0:
    for name, value in content.items():
      yield from _lists_of_arrays(
        value, f'{key}.{name}' if key else str(name), depth - 1
      )
  elif isinstance(content, list | tuple) and any(map(_is_array, content)):
    yield key


def _is_array(x) -> bool:
  return hasattr(x, 'shape') and hasattr(x, 'dtype')


def _content(read_file, file: BinaryIO) -> Any:
  """Reads an open file, or says in our words why it can't be read."""
  try:
    return read_file(file)
  except (ImportError, MemoryError):
    raise
  except Exception as error:  # Of damaged bytes, readers raise anything.
    reason = _reason(error)
  # Without PyTorch's message, which advises to read unsafely.
  raise ValueError(f'{file.name} {reason}')


def _reason(error: Exception) -> str:
  message = re.sub(r'\x1b\[[0-9;]*m', '', str(error))
  refused = re.search(r'GLOBAL ([\w.]+)', message)
  if refused:
    return (
      f'holds an object of the kind {refused[1]}, and only arrays with plain'
      ' values beside them are read, since others can run code. Save the'
      ' weights alone, where that kind is known:'
      ' torch.save(model.state_dict(), FILE).'
    )
  if 'TorchScript' in message:
    return (
      'holds a program of TorchScript, and programs are not run. Save its'
      ' weights alone: torch.save(torch.jit.load(FILE).state_dict(), OUT).'
    )
  # PyTorch's own reason is the last of its sentences.
  said = message.split('WeightsUnpickler error:')[-1].strip().partition('\n')[0]
  if 'weights_only' in said:
    said = ''
  reason = f'{type(error).__name__}: {said}'.rstrip(': .')
  return f'is damaged, or holds more than arrays ({reason}).'


def _read_torch(file: BinaryIO) -> Any:
  """Reads a file of `torch.save` with PyTorch's arrays-only reader."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'Reading {file.name} needs PyTorch: pip install -e ".[torch]".'
    ) from error
  with torch.serialization.safe_globals(list(_harmless())):
    return torch.load(file.name, map_location='cpu', weights_only=True)


def _harmless() -> Iterator[Any]:
  """Yields what a training script may put beside its arrays, and does no harm.

  Either a class or function, or a pair with the name that pickles have.
  """
  yield from (*_PLAIN_KINDS, np.ndarray, np.dtype, *np.ScalarType)
  # As protocol 2 writes bytes.
  yield codecs.encode
  yield from (getattr(np.dtypes, name) for name in np.dtypes.__all__)
  for array in (np.float32(0), np.zeros(1)):
    make = array.__reduce__()[0]
    # A file has the name of the NumPy that wrote it.
    for package in ('core', '_core'):
      yield make, f'numpy.{package}.multiarray.{make.__name__}'
  # PyTorch's reader fills plain dicts alone.
  yield _without_default, 'collections.defaultdict'
  for name, kind in _PATHS.items():
    yield from ((kind, f'{module}.{name}') for module in _PATH_MODULES)


def _without_default(factory: Any = None) -> dict[Any, Any]:
  del factory
  return {}


def _read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
  arrays = np.load(file, allow_pickle=False)
  if isinstance(arrays, np.ndarray):
    raise ValueError('it is one array, without a name.')
  with arrays:
    return dict(arrays)


def _read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
  try:
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      f'Reading {file.name} needs safetensors: pip install -e ".[safetensors]".'
    ) from error
  return safetensors.numpy.load_file(file.name)
