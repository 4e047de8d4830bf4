"""Image transforms: uint8 (H, W, C) arrays on the host, one at a time.

The random ones take a NumPy generator and draw from nothing else. Images stay
uint8 until they are on the device, a quarter of the bytes of float32;
`normalize` runs there.

Axes: N images, H, W, C channels.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ds_jax.data import decoding

_BOX_TRIES = 10
_FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
INTERPOLATIONS = tuple(_FILTERS)


def resize(
  image: np.ndarray | decoding.Picture,
  height: int,
  width: int,
  interpolation: str = 'bilinear',
  box: decoding.Box | None = None,
) -> np.ndarray:
  """Resizes an image, or a part of it; a smaller result is antialiased.

  Args:
    image: uint8 (H, W, 3), or a picture, which is decoded at a reduced scale
      where the part has more pixels than the result.
    height: of the result.
    width: of the result.
    interpolation: one of `INTERPOLATIONS`.
    box: (left, top, right, bottom) of the part, in pixels of the image; None
      means all.

  Returns:
    uint8 (height, width, 3).

  Raises:
    ImageError: for a picture that can't be read.
    ValueError: for an image without pixels.
  """
  if not min(image.shape):
    raise ValueError(
      f'An image of {image.shape[0]} x {image.shape[1]} pixels: expected at'
      ' least 1 x 1.'
    )
  source, box = _source(image, box, (width, height))
  resized = source.resize((width, height), _FILTERS[interpolation], box)
  return np.asarray(resized)


def _source(image, box, size) -> tuple[Image.Image, decoding.Box]:
  """Returns what Pillow resizes, and the place of the box in that."""
  box = box or (0, 0, *image.shape[1::-1])
  if isinstance(image, decoding.Picture):
    return image.image(box, size)
  return Image.fromarray(image), box


def center_crop_resize(
  image: np.ndarray | decoding.Picture,
  size: int,
  crop_ratio: float,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Resizes the short side to `size / crop_ratio`, then crops the centre.

  What is cropped away is not computed: of a long and narrow image the whole, so
  resized, may not fit into memory.

  Args:
    image: uint8 (H, W, 3), or a picture.
    size: S, side of the result.
    crop_ratio: share of the short side that is kept; 0.875 is usual for
      ImageNet.
    interpolation: one of `INTERPOLATIONS`.

  Returns:
    uint8 (S, S, 3).

  Raises:
    ValueError: for an image without pixels.
  """
  sides = image.shape[1::-1]  # width, height
  if not min(sides):
    return resize(image, size, size)
  scale = round(size / crop_ratio) / min(sides)
  starts, ends = [], []
  for side in sides:
    resized = round(side * scale)
    start = (resized - size) // 2
    starts.append(start * side / resized)
    # Rounding must not take it past the image.
    ends.append(min((start + size) * side / resized, side))
  return resize(image, size, size, interpolation, (*starts, *ends))


def for_evaluation(
  image: np.ndarray | decoding.Picture,
  size: int,
  crop_ratio: float = 1.0,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Brings an image to the model's size as evaluation and prediction do.

  Args:
    image: uint8 (H, W, 3), or a picture.
    size: S, side of the result.
    crop_ratio: as in `center_crop_resize`.
    interpolation: one of `INTERPOLATIONS`.

  Returns:
    uint8 (S, S, 3): the image itself if it has that size already, else
    `center_crop_resize` of it.

  Raises:
    ValueError: for an image without pixels.
  """
  if image.shape[:2] == (size, size):
    is_picture = isinstance(image, decoding.Picture)
    return image.pixels() if is_picture else image
  return center_crop_resize(image, size, crop_ratio, interpolation)


def random_crop(
  image: np.ndarray, rng: np.random.Generator, padding: int
) -> np.ndarray:
  """Pads with zeros on every side, then crops to the old size anywhere.

  Args:
    image: uint8 (H, W, C).
    rng: gives the place, every one of (2 padding + 1)^2 as likely.
    padding: in pixels.

  Returns:
    uint8 (H, W, C).
  """
  height, width, channels = image.shape
  top, left = rng.integers(2 * padding + 1, size=2)
  # Not np.pad, which takes longer than the rest of the augmentation.
  padded = np.zeros(
    (height + 2 * padding, width + 2 * padding, channels), image.dtype
  )
  padded[padding : padding + height, padding : padding + width] = image
  return padded[top : top + height, left : left + width]


def random_resized_crop(
  image: np.ndarray | decoding.Picture,
  rng: np.random.Generator,
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Crops a random part and resizes it: Inception's augmentation.

  Szegedy et al., "Going deeper with convolutions" (2015), section 6.

  Args:
    image: uint8 (H, W, 3), or a picture.
    rng: gives the crop.
    size: S, side of the result.
    scale: range of the crop's share of the image's area.
    ratio: range of the crop's width / height, drawn log-uniformly.
    interpolation: one of `INTERPOLATIONS`.

  Returns:
    uint8 (S, S, 3).
  """
  top, left, height, width = _resized_crop_box(
    image.shape[0], image.shape[1], rng, scale, ratio
  )
  box = left, top, left + width, top + height
  source, box = _source(image, box, (size, size))
  # Without what is around it, which a resized part would take a little of.
  outer = (*map(math.floor, box[:2]), *map(math.ceil, box[2:]))
  inner = [x - outer[i % 2] for i, x in enumerate(box)]
  crop = source.crop(outer).resize((size, size), _FILTERS[interpolation], inner)
  return np.asarray(crop)


def random_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int] | None:
  """Draws a box inside an image: its area, its shape, then its place.

  Args:
    height: H.
    width: W.
    rng: gives the box.
    scale: range of the box's share of the image's area, drawn uniformly.
    ratio: range of the box's width / height, drawn log-uniformly.

  Returns:
    (top, left, height, width) in pixels, or None if none of ten fitted.
  """
  log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
  for _ in range(_BOX_TRIES):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(*log_ratio))
    box_width = round(math.sqrt(area * aspect))
    box_height = round(math.sqrt(area / aspect))
    if 0 < box_width <= width and 0 < box_height <= height:
      top = int(rng.integers(height - box_height + 1))
      left = int(rng.integers(width - box_width + 1))
      return top, left, box_height, box_width
  return None


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right for half of the images.

  Args:
    image: (H, W, C).
    rng: decides.

  Returns:
    (H, W, C).
  """
  return image[:, ::-1] if rng.random() < 0.5 else image


def normalize(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Takes pixels to `(pixel / 255 - mean) / std`, on the device.

  Args:
    images: uint8 (N, H, W, C).
    mean: C numbers in units of pixel / 255.
    std: C numbers in the same units.

  Returns:
    float32 (N, H, W, C).
  """
  mean = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
  std = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
  return (images.astype(jnp.float32) / 255 - mean) / std


def _resized_crop_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) of a crop inside the image."""
  box = random_box(height, width, rng, scale, ratio)
  if box is not None:
    return box
  # No crop fitted, so the image is long and narrow: the largest centred one
  # whose ratio is allowed.
  crop_width = min(width, round(height * ratio[1]))
  crop_height = min(height, round(width / ratio[0]))
  top, left = (height - crop_height) // 2, (width - crop_width) // 2
  return top, left, crop_height, crop_width
