"""Files of weights as names to arrays."""

import argparse
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np


def read(path: str) -> dict[str, Any]:
  """Reads a file of weights, arrays only.

  Args:
    path: an `.npz` or `.safetensors` file; any other is PyTorch's (see
      `read_torch`).

  Returns:
    Names to arrays, as in the file.

  Raises:
    ImportError: if the package that reads it is not installed.
    OSError: if there is no such file.
    ValueError: if it is damaged or holds something else.
  """
  file = pathlib.Path(path)
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
  return readers.get(file.suffix, read_torch)(path)


def read_torch(path: str) -> dict[str, Any]:
  """Reads the state of a PyTorch checkpoint with its arrays-only reader.

  Args:
    path: a file of `torch.save`: the state itself, or a dict that holds it as
      `state_dict_ema` (preferred), `state_dict` or `model`.

  Returns:
    Names to tensors.

  Raises:
    ImportError: if PyTorch is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged or holds something else.
  """
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'Reading {path} needs PyTorch: pip install -e ".[torch]".'
    ) from error
  try:
    # Training scripts put their arguments beside the arrays.
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(path, map_location='cpu', weights_only=True)
  except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
    raise _damaged(path, error) from error
  if not isinstance(content, Mapping):
    raise ValueError(f'{path} holds a {type(content).__name__}, not a dict.')
  for name in ('state_dict_ema', 'state_dict', 'model'):
    if isinstance(content.get(name), Mapping):
      return dict(content[name])
  return dict(content)


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
  return ValueError(f'{path} is damaged, or holds more than arrays: {error}')
