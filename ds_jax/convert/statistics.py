"""The mean and deviation that images were normalised by for some weights."""

import json
import math
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
  said = said.get(section) if section and isinstance(said, dict) else said
  return said if isinstance(said, dict) else {}


def _three(path, key, values) -> tuple[float, ...]:
  is_right = (
    isinstance(values, list)
    and len(values) == 3
    and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    and ('std' not in key or min(values) > 0)
  )
  if not is_right:
    raise ValueError(
      f'{path}: {key} is {values!r}; expected three numbers'
      f'{" above 0" * ("std" in key)}.'
    )
  return tuple(map(float, values))
