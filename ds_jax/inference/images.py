"""Pictures as users have them, to images as a network takes them.

Axes: N images, H, W, S side of an image.
"""

from collections.abc import Sequence

import numpy as np

from ds_jax import data


def prepare_images(
  images: np.ndarray | Sequence[np.ndarray],
  image_size: int,
  crop_ratio: float,
  interpolation: str,
) -> np.ndarray:
  """Returns images as the network takes them, (N, S, S, 3) uint8.

  Args:
    images: (N, H, W, 3) or (N, H, W, 1) uint8, or a list of such without N.
    image_size: S, that images of another size are brought to.
    crop_ratio: share of their short side that is kept.
    interpolation: as of `data.for_evaluation`.

  Raises:
    ValueError: for images of another kind, or none.
  """
  if not isinstance(images, (list, tuple)):
    images = np.asarray(images)
    _check_images(images.shape, images.dtype, 4)
  if not len(images):
    raise ValueError('There are no images; expected one or more.')
  expected = (len(images), image_size, image_size, 3)
  if isinstance(images, np.ndarray) and images.shape == expected:
    return images
  prepared = np.empty(expected, np.uint8)
  for i, image in enumerate(images):
    image = np.asarray(image)
    _check_images(image.shape, image.dtype, 3)
    if image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=-1)
    prepared[i] = data.for_evaluation(
      image, image_size, crop_ratio, interpolation
    )
  return prepared


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
