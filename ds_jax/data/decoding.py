"""Encoded pictures to RGB, by Pillow: one way for all who read files.

A picture is turned as its EXIF orientation says; what is transparent shows a
background; grey, palettes, CMYK and 16 bits become eight bits of R, G and B; of
an animation it is the first frame.

Axes: H, W, both of the upright picture.
"""

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)

Box = tuple[float, float, float, float]  # left, top, right, bottom

# Not those that Pillow reads by running another program, such as EPS.
_FORMATS = (
  *('JPEG', 'MPO', 'PNG', 'GIF', 'WEBP', 'BMP', 'DIB', 'TIFF', 'PPM'),
  'AVIF',
)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_SCALES = (8, 4, 2)  # that a JPEG file can be decoded at the inverse of


class ImageError(ValueError):
  """A picture that can't be read; says which, and why."""


@dataclasses.dataclass(frozen=True)
class Picture:
  """An encoded picture, decoded when its pixels are asked for.

  Attributes:
    encoded: the content of a file.
    name: of the file, for errors.
    background: R, G, B that is seen through what is transparent.
  """

  encoded: bytes = dataclasses.field(repr=False)
  name: str = 'picture'
  background: tuple[int, int, int] = WHITE

  @functools.cached_property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, 3), from the file's header.

    Raises:
      ImageError: if it can't be read, or has too many pixels.
    """
    with _explained(self.name):
      image = self._opened()
      width, height = image.size
      if _orientation(image) >= 5:
        width, height = height, width
    # For whoever reads the pixels next, who then need not open it again.
    self.__dict__['_header'] = image
    return height, width, 3

  def pixels(self) -> np.ndarray:
    """Returns uint8 (H, W, 3).

    Raises:
      ImageError: as `shape`, or if the file is damaged.
    """
    return np.asarray(self.image((0, 0, *self.shape[1::-1]))[0])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Lets NumPy take it for its pixels."""
    del copy
    return self.pixels().astype(dtype or np.uint8, copy=False)

  def image(
    self, box: Box, size: tuple[int, int] | None = None
  ) -> tuple[Image.Image, Box]:
    """Decodes, at a reduced scale where that is enough.

    Args:
      box: the part that is wanted, in pixels of the picture.
      size: (width, height) that it will be resized to; None for all there is.

    Returns:
      The whole picture in RGB, and the place of the box in it. It is smaller
      where its format can be decoded at a half, a quarter or an eighth, and the
      box has at least `size` pixels even so.

    Raises:
      ImageError: as `pixels`.
    """
    full = self.shape[1::-1]
    with _explained(self.name):
      image = self.__dict__.pop('_header', None) or self._opened()
      orientation = _orientation(image)
      if size is not None:
        _reduce(image, box, size)
      upright = _rgb(image, self.background)
    if orientation in _UPRIGHT:
      upright = upright.transpose(_UPRIGHT[orientation])
    if upright.size == full:
      return upright, box
    scales = np.divide(upright.size, full)
    # Rounding must not take it past the picture.
    scaled = np.minimum(np.multiply(box, [*scales, *scales]), upright.size * 2)
    return upright, tuple(scaled.tolist())

  def _opened(self) -> Image.Image:
    image = Image.open(io.BytesIO(self.encoded), formats=_readable())
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
      raise ImageError(_too_large(self.name, f'{width * height:,}'))
    return image


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
  """Turns whatever Pillow raises into an ImageError."""
  try:
    yield
  except (ImageError, MemoryError):
    raise
  except Image.UnidentifiedImageError as error:
    raise ImageError(
      f'{name} is no picture that can be read, or its start is damaged;'
      f' expected one of {", ".join(_readable())}.'
    ) from error
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise ImageError(_too_large(name, 'too many')) from error
  # Its decoders raise any exception for a damaged file.
  except Exception as error:
    reason = (str(error) or type(error).__name__).rstrip('.')
    raise ImageError(f'{name} can not be read: {reason}.') from error


def from_file(path: os.PathLike | str, background=WHITE) -> Picture:
  """Reads a file; decodes nothing yet.

  Raises:
    OSError: if it can't be read.
  """
  with open(path, 'rb') as file:
    return Picture(file.read(), str(path), background)


def rgb(image: Image.Image, background=WHITE) -> np.ndarray:
  """Returns the pixels (H, W, 3) uint8 of a Pillow image, upright.

  Raises:
    ImageError: if it can't be decoded, or has floating-point pixels.
  """
  with _explained(getattr(image, 'filename', '') or 'The image'):
    orientation = _orientation(image)
    upright = _rgb(image, background)
  if orientation in _UPRIGHT:
    upright = upright.transpose(_UPRIGHT[orientation])
  return np.asarray(upright)


@functools.cache
def _readable() -> tuple[str, ...]:
  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_large(name, number) -> str:
  return (
    f'{name} has {number} pixels; at most {Image.MAX_IMAGE_PIXELS:,} are read,'
    ' since a small file can hold more than the memory. Make it smaller, or'
    ' raise PIL.Image.MAX_IMAGE_PIXELS.'
  )


def _orientation(image: Image.Image) -> int:
  if image.format == 'TIFF':  # which Pillow turns by itself
    return 1
  try:
    return int(image.getexif().get(_ORIENTATION, 1))
  # A damaged tag is none.
  except Exception:
    return 1


def _reduce(image: Image.Image, box: Box, size: tuple[int, int]) -> None:
  """Has a JPEG file decoded at a scale that leaves the box large enough."""
  if image.format not in ('JPEG', 'MPO'):
    return
  # A side of the box, however the picture is turned.
  wanted, has = max(size), min(box[2] - box[0], box[3] - box[1])
  for scale in _SCALES:
    if has >= wanted * scale:
      image.draft(None, tuple(max(1, side // scale) for side in image.size))
      return


def _rgb(image: Image.Image, background) -> Image.Image:
  """Decodes to mode RGB."""
  image.load()
  if image.mode == 'F':
    raise ValueError('floating-point pixels, whose range is not known')
  if image.mode.startswith('I'):
    # 16 bits; Pillow would cut off what is above 255.
    high = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
    image = Image.fromarray(high.astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    below = Image.new('RGBA', image.size, (*background, 255))
    return Image.alpha_composite(below, image).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')
