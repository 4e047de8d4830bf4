"""What a source is, and those that are made of arrays or encoded images.

Axes: N images, H, W.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from ds_jax.data import decoding

# For errors about data that are not there.
RUN_EMBEDDED = (
  'To run without it, take the embedded data set:'
  ' --config.dataset.name=digits (or another model on it:'
  ' --config=configs/ds_digits.py).'
)


class Example(TypedDict):
  """One labelled image."""

  image: np.ndarray | decoding.Picture  # uint8 (H, W, 3), or still encoded
  label: int


class Source(Protocol):
  """A random-access data set, that threads may read at the same time.

  It may have `class_names`, of the labels from 0 on; else `labels`, (N,)
  integers, or, to be read whole for them, neither.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


class DatasetNotFoundError(FileNotFoundError):
  """A known data set is not on disk in a form that can be read."""


class GreySource:
  """Grey images held in memory, given as RGB.

  Attributes:
    images: uint8 (N, H, W).
    labels: uint8 (N,).
  """

  def __init__(self, name: str, images: np.ndarray, labels: np.ndarray):
    self._name = name
    self.images = images
    self.labels = labels

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    image = np.repeat(self.images[index][:, :, None], 3, axis=2)
    return Example(image=image, label=int(self.labels[index]))

  def __repr__(self) -> str:
    return f'GreySource({self._name})'


class EncodedSource:
  """Records of encoded images, decoded when they are asked for.

  Attributes:
    class_names: of the labels.
  """

  def __init__(
    self,
    name: str,
    records: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    keys: tuple[str, str] = ('image', 'label'),
  ):
    """Reads nothing yet.

    Args:
      name: for `repr`, and for errors.
      records: give dicts with an encoded image (bytes, or a dict of `bytes` and
        `path`) and a label.
      class_names: of the labels.
      keys: of image and label in a record.
    """
    self._name = name
    self._records = records
    self._keys = keys
    self.class_names = tuple(class_names)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    image, label = (record[key] for key in self._keys)
    if isinstance(image, dict):
      if image['bytes'] is None:
        picture = decoding.from_file(image['path'])
        return Example(image=picture, label=int(label))
      image = image['bytes']
    picture = decoding.Picture(image, f'image {index} of {self._name}')
    return Example(image=picture, label=int(label))

  def __repr__(self) -> str:
    return f'EncodedSource({self._name})'


class Subset:
  """Some images of a source."""

  def __init__(self, source: Source, indices: np.ndarray):
    """Reads nothing yet.

    Args:
      source: of all images.
      indices: (n,) of those to give, in this order.
    """
    self._source = source
    self._indices = indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._source[int(self._indices[index])]

  def __getattr__(self, name: str):
    if name == 'class_names':
      return self._source.class_names
    raise AttributeError(name)

  def __repr__(self) -> str:
    return f'Subset({self._source!r}, {len(self)} of {len(self._source)})'


def open_either(
  where: str,
  splits: Sequence[str],
  split: str,
  open_split: Callable[[str], Source],
  test_share: float,
) -> Source:
  """Opens the train split, or the one to test, whatever it is called.

  Args:
    where: the data set is, for errors.
    splits: that it has.
    split: `train` or `test`.
    open_split: takes one of the splits to its images.
    test_share: of the images, for the test split, where there is none that has
      labels.

  Raises:
    DatasetNotFoundError: if there is no train split.
  """
  if 'train' not in splits:
    raise DatasetNotFoundError(
      f'The copy in {where} has no split train, only {sorted(splits)}.'
    )
  for name in ('test', 'validation'):
    test = open_split(name) if name in splits else None
    # Some sets keep the labels of their test split to themselves.
    if test is not None and (not len(test) or test[0]['label'] >= 0):
      return test if split == 'test' else open_split('train')
  source = open_split('train')
  is_test = np.array(
    [share_of(str(i)) < test_share for i in range(len(source))]
  )
  return Subset(source, np.flatnonzero(is_test == (split == 'test')))


def share_of(name: str) -> float:
  """Returns a number in [0, 1) that depends on a name alone."""
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64
