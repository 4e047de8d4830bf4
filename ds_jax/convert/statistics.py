"""The mean and deviation that images were normalised by for some weights."""

import json
import pathlib
from typing import Any

from ds_jax import paths
from ds_jax.convert import formats
from ds_jax.data import sources

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Statistics = sources.channel_statistics('imagenet2012')


def channel_statistics(path: str, known: formats.Format) -> Statistics | None:
  """Returns mean and std in units of pixel / 255; None if they are not known.

  Args:
    path: of a file of weights. Beside it may lie `config.json`, as timm writes
      it, or Hugging Face's `preprocessor_config.json`.
    known: its format.

  Raises:
    ValueError: if one of those does not say three numbers each.
  """
  folder = pathlib.Path(paths.expanded(path)).parent
  for name, section, keys in (
    ('config.json', 'pretrained_cfg', ('mean', 'std')),
    ('preprocessor_config.json', None, ('image_mean', 'image_std')),
  ):
    said = _read(folder / name, section)
    if all(key in said for key in keys):
      return tuple(_three(folder / name, key, said[key]) for key in keys)
  return IMAGENET if known.has_imagenet_statistics else None


def _read(path, section) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    said = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}.') from error
  return said.get(section, {}) if section else said


def _three(path, key, values) -> tuple[float, ...]:
  if not isinstance(values, list) or len(values) != 3:
    raise ValueError(f'{path}: {key} is {values!r}; expected three numbers.')
  return tuple(float(value) for value in values)
