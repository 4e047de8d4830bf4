"""The digits of scikit-learn, which come with it."""

import functools

import numpy as np
from PIL import Image

from ds_jax.data import source

_NUM_TRAIN = 1437
_SIZE = 32


@functools.lru_cache(maxsize=1)
def load() -> dict[str, source.GreySource]:
  """scikit-learn's 1,797 digits at 32x32: 1,437 train, 360 test.

  The split is one fixed permutation, not stratified.
  """
  # Imported here: it takes over a second, and no other source needs it.
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.stack([_enlarged(image) for image in digits.images])
  labels = digits.target.astype(np.uint8)
  # RandomState's stream is frozen for good; default_rng's is not.
  order = np.random.RandomState(0).permutation(len(images))
  train, test = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
  return {
    'train': source.GreySource('digits, train', images[train], labels[train]),
    'test': source.GreySource('digits, test', images[test], labels[test]),
  }


def _enlarged(values: np.ndarray) -> np.ndarray:
  """Takes an (8, 8) digit with values 0 .. 16 to uint8 (32, 32)."""
  pixels = np.round(values * (255 / 16)).astype(np.uint8)
  size = (_SIZE, _SIZE)
  return np.asarray(Image.fromarray(pixels).resize(size, Image.BILINEAR))
