"""RandAugment, colour jitter and random erasing of training images.

Every function takes and gives uint8 (H, W, 3) on the host, one image at a time,
and changes no array in place. The random ones take a NumPy generator and draw
from nothing else.

An operation of RandAugment takes a signed level: magnitude / 10, negated for
half of the applications. The two directions of a symmetric operation are as
likely; the others go by the absolute value. In `OPERATIONS` a higher magnitude
is never milder, which timm calls "increasing"; in `FALLING_OPERATIONS` it is,
for some.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ds_jax.data import transforms

Operation = Callable[[np.ndarray, float], np.ndarray]

# timm's for 'rand-m9-mstd0.5-inc1', the recipe of DeiT. The paper applies every
# layer, but counts the identity among its operations.
_LAYER_PROBABILITY = 0.5
_MAGNITUDE_STD = 0.5

# What a level of 1 stands for.
_MAX_ROTATION = 30.0  # degrees
_MAX_SHEAR = 0.3  # pixels a row or column
_MAX_TRANSLATION = 0.45  # of the side
_MAX_ENHANCEMENT = 0.9  # a factor is 1 plus or minus this
_MAX_LOST_BITS = 4  # beyond the four that level 0 loses
_MAX_ADDED = 110
_DARK = 128  # what is less is added to

_FILL = (128, 128, 128)
_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


def rand_augment(
  image: np.ndarray,
  rng: np.random.Generator,
  num_layers: int,
  magnitude: float,
  increasing: bool = True,
) -> np.ndarray:
  """Applies random operations one after another, half of them on average.

  Cubuk et al., "RandAugment" (2020), in timm's variant: each layer applies one
  of 15 operations, all as likely, with probability 1/2, at a magnitude drawn
  from a normal distribution around the given one, of standard deviation 0.5,
  clipped to 0 .. 10.

  Args:
    image: uint8 (H, W, 3).
    rng: gives operations and magnitudes.
    num_layers: how often an operation is drawn; 2 is usual.
    magnitude: 0 .. 10; 9 is usual.
    increasing: whether the operations are `OPERATIONS`, as in DeiT's recipe, or
      `FALLING_OPERATIONS`, as in that of the authors' release.

  Returns:
    uint8 (H, W, 3); what moves in from outside the image is grey.
  """
  operations = OPERATIONS if increasing else FALLING_OPERATIONS
  operations = tuple(operations.values())
  for _ in range(num_layers):
    if rng.random() < _LAYER_PROBABILITY:
      operation = operations[rng.integers(len(operations))]
      image = operation(image, _random_level(rng, magnitude))
  return image


def color_jitter(
  image: np.ndarray, rng: np.random.Generator, strength: float
) -> np.ndarray:
  """Changes brightness, contrast and saturation, in a random order.

  Args:
    image: uint8 (H, W, 3).
    rng: gives the order and the factors.
    strength: j; each factor is uniform in 1 - j .. 1 + j.

  Returns:
    uint8 (H, W, 3).
  """
  order = rng.permutation(len(_JITTERED))
  factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERED))
  for i in order:
    image = _enhance(_JITTERED[i], image, factors[i])
  return image


def random_erasing(
  image: np.ndarray,
  rng: np.random.Generator,
  probability: float,
  statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> np.ndarray:
  """Replaces a random box by noise, drawn for every byte of it.

  Zhong et al., "Random erasing data augmentation" (2020). The box has 0.02 to
  1/3 of the image's area, uniformly, and a width / height of 0.3 to 1 / 0.3,
  log-uniformly.

  Args:
    image: uint8 (H, W, 3).
    rng: decides, and gives the box and the noise.
    probability: of erasing.
    statistics: None for uniform noise in 0 .. 255; or mean and standard
      deviation of the data set's channels, each three numbers in units of pixel
      / 255, for normal noise that has them: of mean 0 and deviation 1 once
      images are normalised, but for what is cut off at 0 and 255.

  Returns:
    uint8 (H, W, 3): the image itself if nothing is erased, which is also so
    where no box was found that fits into a long and narrow image.
  """
  if rng.random() >= probability:
    return image
  box = transforms.random_box(
    *image.shape[:2], rng, _ERASED_AREA, _ERASED_RATIO
  )
  if box is None:
    return image
  top, left, height, width = box
  erased = image.copy()
  erased[top : top + height, left : left + width] = _noise(
    rng, (height, width, 3), statistics
  )
  return erased


def _noise(rng, shape, statistics) -> np.ndarray:
  """Draws uint8 noise; see `random_erasing`."""
  if statistics is None:
    return rng.integers(256, size=shape, dtype=np.uint8)
  mean, std = np.asarray(statistics)
  pixels = 255 * (mean + std * rng.standard_normal(shape))
  return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _random_level(rng: np.random.Generator, magnitude: float) -> float:
  """Draws a level, -1 .. 1, for a magnitude, 0 .. 10."""
  drawn = rng.normal(magnitude, _MAGNITUDE_STD)
  level = min(max(drawn, 0.0), 10.0) / 10
  return -level if rng.random() < 0.5 else level


def _autocontrast(image: np.ndarray, level: float) -> np.ndarray:
  """Stretches every channel to 0 .. 255."""
  del level
  return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def _equalize(image: np.ndarray, level: float) -> np.ndarray:
  """Flattens every channel's histogram."""
  del level
  return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def _invert(image: np.ndarray, level: float) -> np.ndarray:
  """Takes every value to 255 - value."""
  del level
  return 255 - image


def _rotate(image: np.ndarray, level: float) -> np.ndarray:
  """Turns about the centre, counter-clockwise for a positive level."""
  rotated = Image.fromarray(image).rotate(
    level * _MAX_ROTATION, Image.BILINEAR, fillcolor=_FILL
  )
  return np.asarray(rotated)


def _posterize(image: np.ndarray, level: float) -> np.ndarray:
  """Clears low bits: four at level 0, all eight at 1."""
  num_cleared = 4 + int(abs(level) * _MAX_LOST_BITS)
  return image & (256 - 2**num_cleared)


def _solarize(image: np.ndarray, level: float) -> np.ndarray:
  """Inverts values from a threshold on: 256 at level 0, 0 at 1."""
  threshold = 256 - int(abs(level) * 256)
  return np.where(image < threshold, image, 255 - image)


def _solarize_add(image: np.ndarray, level: float) -> np.ndarray:
  """Adds to dark values: nothing at level 0, 110 at 1."""
  added = np.minimum(image.astype(int) + int(abs(level) * _MAX_ADDED), 255)
  return np.where(image < _DARK, added, image).astype(np.uint8)


def _posterize_falling(image: np.ndarray, level: float) -> np.ndarray:
  """Clears low bits: all eight at level 0, four at 1."""
  num_kept = int(abs(level) * _MAX_LOST_BITS)
  return image & (256 - 2 ** (8 - num_kept))


def _solarize_falling(image: np.ndarray, level: float) -> np.ndarray:
  """Inverts values from a threshold on: 0 at level 0, 256 at 1."""
  return np.where(image < int(abs(level) * 256), image, 255 - image)


def _enhance(enhancer, image: np.ndarray, factor: float) -> np.ndarray:
  """Scales the distance from a dull image: Pillow's `ImageEnhance`.

  The dull one is black for brightness, the mean grey for contrast, grey for
  colour and smooth for sharpness.
  """
  return np.asarray(enhancer(Image.fromarray(image)).enhance(factor))


def _enhance_by_level(enhancer, image: np.ndarray, level: float) -> np.ndarray:
  """Enhances by a factor from 0.1, at level -1, to 1.9, at 1."""
  return _enhance(enhancer, image, 1 + level * _MAX_ENHANCEMENT)


def _enhance_falling(enhancer, image: np.ndarray, level: float) -> np.ndarray:
  """Enhances by a factor from 0.1, at level 0, to 1.9, at 1."""
  return _enhance_by_level(enhancer, image, 2 * abs(level) - 1)


def _transform(image: np.ndarray, *matrix: float) -> np.ndarray:
  """Fills (x, y) from (a x + b y + c, d x + e y + f), in pixels."""
  height, width = image.shape[:2]
  moved = Image.fromarray(image).transform(
    (width, height), Image.AFFINE, matrix, Image.BILINEAR, fillcolor=_FILL
  )
  return np.asarray(moved)


def _shear_x(image: np.ndarray, level: float) -> np.ndarray:
  """Shifts rows, the lower the farther, left for a positive level."""
  return _transform(image, 1, level * _MAX_SHEAR, 0, 0, 1, 0)


def _shear_y(image: np.ndarray, level: float) -> np.ndarray:
  """Shifts columns, the farther right the more, up for a positive level."""
  return _transform(image, 1, 0, 0, level * _MAX_SHEAR, 1, 0)


def _translate_x(image: np.ndarray, level: float) -> np.ndarray:
  """Shifts left for a positive level."""
  pixels = level * (_MAX_TRANSLATION * image.shape[1])
  return _transform(image, 1, 0, pixels, 0, 1, 0)


def _translate_y(image: np.ndarray, level: float) -> np.ndarray:
  """Shifts up for a positive level."""
  pixels = level * (_MAX_TRANSLATION * image.shape[0])
  return _transform(image, 1, 0, 0, 0, 1, pixels)


OPERATIONS: dict[str, Operation] = {
  'autocontrast': _autocontrast,
  'equalize': _equalize,
  'invert': _invert,
  'rotate': _rotate,
  'posterize': _posterize,
  'solarize': _solarize,
  'solarize_add': _solarize_add,
  'color': functools.partial(_enhance_by_level, ImageEnhance.Color),
  'contrast': functools.partial(_enhance_by_level, ImageEnhance.Contrast),
  'brightness': functools.partial(_enhance_by_level, ImageEnhance.Brightness),
  'sharpness': functools.partial(_enhance_by_level, ImageEnhance.Sharpness),
  'shear_x': _shear_x,
  'shear_y': _shear_y,
  'translate_x': _translate_x,
  'translate_y': _translate_y,
}

FALLING_OPERATIONS: dict[str, Operation] = {
  **OPERATIONS,
  'posterize': _posterize_falling,
  'solarize': _solarize_falling,
  'color': functools.partial(_enhance_falling, ImageEnhance.Color),
  'contrast': functools.partial(_enhance_falling, ImageEnhance.Contrast),
  'brightness': functools.partial(_enhance_falling, ImageEnhance.Brightness),
  'sharpness': functools.partial(_enhance_falling, ImageEnhance.Sharpness),
}
