"""Pictures as users have them, to images as a network takes them.

Axes: N images, H, W, S side of an image.
"""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ds_jax import data, paths
from ds_jax.data import decoding, folders

# Anything that a predictor takes for one image.
Item = np.ndarray | data.Picture | Image.Image | bytes | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Preparation:
  """How images are brought to what a network takes.

  Attributes:
    image_size: S, that images of another size are brought to.
    crop_ratio: share of their short side that is kept.
    interpolation: as of `data.for_evaluation`.
    background: R, G, B that is seen through what is transparent.
  """

  image_size: int
  crop_ratio: float = 1.0
  interpolation: str = 'bilinear'
  background: Sequence[int] = decoding.WHITE

  def one(self, item: Item) -> np.ndarray:
    """Returns one image, uint8 (S, S, 3).

    Args:
      item: a path, the content of a file, an image of Pillow, or an array
        (H, W, 3) or (H, W, 1), uint8.

    Raises:
      ImageError: for a file that can't be read.
      OSError: for a file that is not there.
      ValueError: for anything else.
    """
    if isinstance(item, (str, os.PathLike)):
      item = decoding.from_file(paths.expanded(item), self.background)
    elif isinstance(item, (bytes, bytearray, memoryview)):
      item = data.Picture(bytes(item), 'the bytes', self.background)
    elif isinstance(item, Image.Image):
      item = decoding.rgb(item, self.background)
    elif not isinstance(item, data.Picture):
      item = np.asarray(item)
      _check_images(item.shape, item.dtype, 3)
      if item.shape[-1] == 1:
        item = np.repeat(item, 3, axis=-1)
    return data.for_evaluation(
      item, self.image_size, self.crop_ratio, self.interpolation
    )

  def all(
    self,
    items: np.ndarray | Sequence[Item],
    run: Callable[[Callable, Iterable], Iterable] = map,
  ) -> np.ndarray:
    """Returns images, uint8 (N, S, S, 3).

    Args:
      items: of `listed`.
      run: `map`, or that of an executor.
    """
    size = self.image_size
    expected = (len(items), size, size, 3)
    if isinstance(items, np.ndarray) and items.shape == expected:
      return items
    prepared = np.empty(expected, np.uint8)
    for i, image in enumerate(run(self.one, items)):
      prepared[i] = image
    return prepared


def listed(images: Any) -> np.ndarray | Sequence[Item]:
  """Returns images, one by one, as a user gave them.

  Args:
    images: uint8 (N, H, W, 3) or (N, H, W, 1); a path, a folder, the content
      of a file or an image of Pillow; or a list of any of these, arrays without
      N.

  Raises:
    OSError: for a path that does not exist.
    ValueError: for images of another kind, or none.
  """
  one = (str, os.PathLike, bytes, bytearray, Image.Image, data.Picture)
  if isinstance(images, one):
    images = [images]
  if not isinstance(images, (list, tuple)):
    images = np.asarray(images)
    _check_images(images.shape, images.dtype, 4)
  elif any(isinstance(item, (str, os.PathLike)) for item in images):
    images = [found for item in images for found in _in_folder(item)]
  if not len(images):
    raise ValueError('There are no images; expected one or more.')
  return images


def files(pattern: str) -> list[pathlib.Path]:
  """Returns the files that an argument of a command stands for, in order.

  Args:
    pattern: a file, a folder, in which all pictures are meant, or a glob.

  Raises:
    FileNotFoundError: if there is none.
  """
  path = pathlib.Path(os.path.expanduser(pattern))
  if path.is_dir():
    found = list(folders.pictures(path))
  elif path.exists():
    found = [path]
  else:
    matches = sorted(glob.glob(str(path), recursive=True))
    found = [pathlib.Path(match) for match in matches if os.path.isfile(match)]
  if not found:
    what = 'no picture in it' if path.is_dir() else 'no such file'
    raise FileNotFoundError(f'{pattern}: {what}.')
  return found


def _in_folder(item) -> Sequence[Item]:
  is_folder = isinstance(item, (str, os.PathLike)) and os.path.isdir(
    paths.expanded(item)
  )
  return files(os.fspath(item)) if is_folder else [item]


def _check_images(shape, dtype, num_axes) -> None:
  """Raises ValueError unless these are images, (N,) H, W, and 1 or 3 channels.

  Those of a list have no N.
  """
  if len(shape) == num_axes and shape[-1] in (1, 3) and dtype == np.uint8:
    return
  if dtype != np.uint8:
    advice = 'give pixels as they are in a file, before any scaling'
  elif len(shape) == num_axes - 1 and shape[-1] in (1, 3):
    advice = 'add the batch axis to a single image with image[None]'
  elif len(shape) == num_axes - 1:
    advice = 'add the channel axis to grey images with images[..., None]'
  else:
    advice = 'channels come last'
  batch = '(N, ' if num_axes == 4 else '('
  raise ValueError(
    f'Images of shape {shape} and dtype {dtype}: expected {batch}H, W, 3) or'
    f' {batch}H, W, 1), uint8 in 0 .. 255; {advice}.'
  )
