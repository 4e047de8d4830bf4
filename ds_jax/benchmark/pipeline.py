"""Times the input pipeline: a run's own, and on JPEG files beside others."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from ds_jax import config as config_lib
from ds_jax import data
from ds_jax.benchmark import timing
from ds_jax.data import transforms

SECTION = 'input pipeline'
# Width and height: ImageNet's usual size, and a camera's.
_SIZES = ((500, 375), (1600, 1200))
_NUM_FILES, _NUM_COPIES = 32, 255
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_IMAGE_SIZE = 224


def run_ways(config: config_lib.DataConfig) -> list[timing.Way]:
  """Training batches of a run, read and augmented, and nothing else."""
  batches = data.train_batches(config, seed=0)
  name = f'{config.name.partition(":")[0]}, {config.image_size} pixels'

  def call():
    return next(batches)['labels']

  return [timing.Way(SECTION, name, config.batch_size, 0, call)]


@contextlib.contextmanager
def jpeg_ways() -> Iterator[list[timing.Way]]:
  """Gives ways to batches of JPEG files, each in one thread.

  Read, decode, take a random part to 224 x 224 pixels, mirror, stack: by
  ds_jax, by plain Pillow, and, where it is installed, by plain OpenCV, whose
  linear resize does not antialias. The files are there until the end.
  """
  with tempfile.TemporaryDirectory() as folder:
    ways = []
    for width, height in _SIZES:
      root = pathlib.Path(folder) / f'{width}x{height}'
      paths = _write(root, width, height)
      config = config_lib.DataConfig(
        f'imagefolder:{root}',
        image_size=_IMAGE_SIZE,
        batch_size=_NUM_FILES,
        crop='resized',
        num_threads=0,
        drop_copies=False,
      )
      batches = data.train_batches(config, seed=0)
      calls: dict[str, Callable] = {'ds_jax': lambda b=batches: next(b)}
      calls['Pillow'] = _plain(paths, _by_pillow)
      with contextlib.suppress(ImportError):
        calls['OpenCV'] = _plain(paths, _by_opencv())
      ways += [
        timing.Way(SECTION, f'{name}, {width} x {height}', _NUM_FILES, 0, call)
        for name, call in calls.items()
      ]
    yield ways


def jpeg_ratios(rows: Sequence[timing.Row]) -> dict[str, float]:
  """Returns images a second over plain Pillow's, for each size of picture."""
  ratios = {}
  for width, height in _SIZES:
    size = f'{width} x {height}'
    (ratio,) = timing.ratio(rows, f'Pillow, {size}', f'ds_jax, {size}').values()
    ratios[size] = ratio
  return ratios


def _write(root, width, height) -> list[pathlib.Path]:
  """Writes pictures as cameras make them: smooth, with a little noise."""
  rng = np.random.default_rng(0)
  paths = []
  for split in ('train', 'val'):
    folder = root / split / 'some'
    folder.mkdir(parents=True)
    for i in range(_NUM_FILES):
      coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
      smooth = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
      noisy = np.asarray(smooth) + rng.normal(0, 6, (height, width, 3))
      image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
      path = folder / f'{i}.jpg'
      image.save(path, quality=90)
      if split == 'val':
        break  # there must be one to test
      paths.append(path)
      # Of a set of a few, the order takes longer than the pictures.
      for copy in range(_NUM_COPIES):
        os.link(path, folder / f'{i}_{copy}.jpg')
  return paths


def _plain(paths, read):
  rng = np.random.default_rng(0)

  def call():
    images = [read(path, rng) for path in paths]
    return np.stack(images)

  return call


def _box(height, width, rng):
  box = transforms.random_box(height, width, rng, _SCALE, _RATIO)
  return box or (0, 0, height, width)


def _by_pillow(path, rng):
  image = Image.open(path).convert('RGB')
  top, left, height, width = _box(image.height, image.width, rng)
  crop = image.crop((left, top, left + width, top + height))
  size = _IMAGE_SIZE, _IMAGE_SIZE
  resized = crop.resize(size, Image.Resampling.BILINEAR)
  if rng.random() < 0.5:
    resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(resized)


def _by_opencv():
  # Imported here: an option.
  import cv2

  cv2.setNumThreads(0)

  def read(path, rng):
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    top, left, height, width = _box(*image.shape[:2], rng)
    crop = image[top : top + height, left : left + width]
    resized = cv2.resize(crop, (_IMAGE_SIZE, _IMAGE_SIZE))
    return cv2.flip(resized, 1) if rng.random() < 0.5 else resized

  return read
