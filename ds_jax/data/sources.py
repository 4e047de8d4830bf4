"""Random-access image sources by name.

A source has a length and gives `{'image': uint8 (H, W, 3), 'label': int}` for
an index. Nothing here downloads: a data set that is not on disk raises
`DatasetNotFoundError`, which says how to prepare it. `digits` is embedded.

Axes: N images, H, W.
"""

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable
from typing import Protocol, TypedDict

import jax
import numpy as np
from PIL import Image

from ds_jax import paths
from ds_jax.data import transforms
from ds_jax.data.idx import read_idx


class Example(TypedDict):
  """One labelled image."""

  image: np.ndarray  # uint8 (H, W, 3)
  label: int


class Source(Protocol):
  """A random-access data set."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


class DatasetNotFoundError(FileNotFoundError):
  """A known data set is not on disk in a form that can be read."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What a data set holds.

  Attributes:
    name: as it was asked for.
    num_train: images in the train split.
    num_test: images in the test split.
    num_classes: labels are 0 .. num_classes - 1.
    labels: the lowest and the highest that occur; None where the data set's own
      description tells the classes.
    mean: of each channel, in units of pixel / 255.
    std: of each channel, in the same units.
  """

  name: str
  num_train: int
  num_test: int
  num_classes: int
  labels: tuple[int, int] | None
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class _TfdsFacts:
  """Constants of a data set of TFDS; mean and std in units of pixel / 255."""

  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  test_split: str = 'test'
  # Files that TFDS can't fetch by itself.
  manual_files: tuple[str, ...] = ()


_TFDS = {
  'cifar10': _TfdsFacts(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  'cifar100': _TfdsFacts(
    100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
  ),
  'fashion_mnist': _TfdsFacts(10, (0.2860,) * 3, (0.3530,) * 3),
  'imagenet2012': _TfdsFacts(
    1000,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    test_split='validation',
    manual_files=('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'),
  ),
}
_KNOWN = ('digits', 'idx:DIR', *_TFDS)
_IDX_PREFIX = {'train': 'train', 'test': 't10k'}
_NUM_DIGITS_TRAIN = 1437
_DIGITS_SIZE = 32

_RUN_EMBEDDED = (
  'To run without it, take the embedded data set:'
  ' --config.dataset.name=digits (or another model on it:'
  ' --config=configs/ds_digits.py).'
)


def load_source(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens one split of a data set.

  Args:
    name: 'digits', 'idx:DIR' (or 'idx' with `data_dir`), 'cifar10',
      'cifar100', 'fashion_mnist' or 'imagenet2012'.
    split: 'train' or 'test'; for imagenet2012 the latter is its validation
      split.
    data_dir: where TFDS copies (or the IDX files) are; None or '' means
      $TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    The source. Loading the same one again returns the same object.

  Raises:
    DatasetNotFoundError: if the data are not there, or not as array_record.
    ValueError: if the name or the split is unknown, or a file is damaged.
  """
  if split not in ('train', 'test'):
    raise ValueError(f"Unknown split {split!r}; known: 'train', 'test'.")
  kind, folder = _parse_name(name, data_dir)
  if kind == 'digits':
    return _load_digits()[split]
  if kind == 'idx':
    return _load_idx(folder, split)
  return _load_tfds(kind, folder, split)


def dataset_info(name: str, data_dir: str | None = None) -> DatasetInfo:
  """Describes a data set that is on disk.

  Args:
    name: as in `load_source`.
    data_dir: as in `load_source`.

  Returns:
    Sizes as found on disk; mean and std as in `channel_statistics`.

  Raises:
    DatasetNotFoundError: as `load_source`.
    ValueError: as `load_source`, or for a split without images.
  """
  train = load_source(name, 'train', data_dir)
  test = load_source(name, 'test', data_dir)
  kind, _ = _parse_name(name, data_dir)
  for split, source in (('train', train), ('test', test)):
    if not len(source):
      raise ValueError(
        f'The {split} split of {name!r} has no images. Put some there.'
      )
  if kind in _TFDS:
    labels, num_classes = None, _TFDS[kind].num_classes
  else:
    found = np.concatenate([train.labels, test.labels])
    labels = int(found.min()), int(found.max())
    num_classes = 1 + labels[1]
  mean, std = channel_statistics(kind)
  return DatasetInfo(
    name, len(train), len(test), num_classes, labels, mean=mean, std=std
  )


def channel_statistics(
  name: str,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
  """Mean and standard deviation of a data set's channels; reads no data.

  Args:
    name: as in `load_source`; 'idx' needs no folder here.

  Returns:
    (mean, std), each of R, G, B in units of pixel / 255: the usual constants
    of the TFDS data sets. Of 'digits' and 'idx:DIR' nothing is assumed: 0.5
    and 0.5 take pixels to -1 .. 1.

  Raises:
    ValueError: if the name is unknown.
  """
  kind, _ = _parse_name(name, data_dir='any')
  if kind in _TFDS:
    return _TFDS[kind].mean, _TFDS[kind].std
  return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def normalizer(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that takes a data set's pixels to a model's floats."""
  mean, std = channel_statistics(name)
  return functools.partial(transforms.normalize, mean=mean, std=std)


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


class TfdsSource:
  """Encoded images of a TFDS copy, decoded to RGB when asked for."""

  def __init__(self, name: str, records):
    """Wraps a data source of TFDS.

    Args:
      name: for `repr`.
      records: gives dicts with 'image', encoded bytes, and 'label'.
    """
    self._name = name
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    # ImageNet has a few grey and CMYK files.
    image = Image.open(io.BytesIO(record['image'])).convert('RGB')
    return Example(image=np.asarray(image), label=int(record['label']))

  def __repr__(self) -> str:
    return f'TfdsSource({self._name})'


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

  def __repr__(self) -> str:
    return f'Subset({self._source!r}, {len(self)} of {len(self._source)})'


def _parse_name(name: str, data_dir: str | None) -> tuple[str, pathlib.Path]:
  """Splits 'idx:DIR', checks the name and settles where the data are."""
  kind, _, folder = name.partition(':')
  if kind == 'idx' and (folder or data_dir):
    return kind, pathlib.Path(paths.expanded(folder or data_dir))
  if name != 'digits' and name not in _TFDS:
    raise ValueError(f'Unknown data set {name!r}; known: {", ".join(_KNOWN)}.')
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  return name, pathlib.Path(paths.expanded(data_dir or default))


@functools.lru_cache(maxsize=1)
def _load_digits() -> dict[str, GreySource]:
  """scikit-learn's 1,797 digits at 32x32: 1,437 train, 360 test.

  The split is one fixed permutation, not stratified.
  """
  # Imported here: it takes over a second, and no other source needs it.
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.stack([_enlarged_digit(image) for image in digits.images])
  labels = digits.target.astype(np.uint8)
  # RandomState's stream is frozen for good; default_rng's is not.
  order = np.random.RandomState(0).permutation(len(images))
  train, test = order[:_NUM_DIGITS_TRAIN], order[_NUM_DIGITS_TRAIN:]
  return {
    'train': GreySource('digits, train', images[train], labels[train]),
    'test': GreySource('digits, test', images[test], labels[test]),
  }


def _enlarged_digit(values: np.ndarray) -> np.ndarray:
  """Takes an (8, 8) digit with values 0 .. 16 to uint8 (32, 32)."""
  pixels = np.round(values * (255 / 16)).astype(np.uint8)
  size = (_DIGITS_SIZE, _DIGITS_SIZE)
  return np.asarray(Image.fromarray(pixels).resize(size, Image.BILINEAR))


@functools.lru_cache(maxsize=4)
def _load_idx(folder: pathlib.Path, split: str) -> GreySource:
  """Reads one split's image and label files."""
  prefix = _IDX_PREFIX[split]
  images_path = _find_idx(folder, f'{prefix}-images', num_dims=3)
  labels_path = _find_idx(folder, f'{prefix}-labels', num_dims=1)
  images = read_idx(images_path, num_dims=3)
  labels = read_idx(labels_path, num_dims=1)
  if len(images) != len(labels):
    raise ValueError(
      f'{images_path} has {len(images)} images, but {labels_path} has'
      f' {len(labels)} labels.'
    )
  return GreySource(f'idx:{folder}, {split}', images, labels)


def _find_idx(folder: pathlib.Path, stem: str, num_dims: int) -> pathlib.Path:
  """The first spelling of an IDX file's name that exists."""
  spellings = [
    f'{stem}{mark}idx{num_dims}-ubyte{ending}'
    for mark in '-.'
    for ending in ('', '.gz')
  ]
  for spelling in spellings:
    if (folder / spelling).is_file():
      return folder / spelling
  wanted = ', '.join(
    f'{prefix}-{content}-ubyte'
    for prefix in _IDX_PREFIX.values()
    for content in ('images-idx3', 'labels-idx1')
  )
  raise DatasetNotFoundError(
    f'No {stem} file in {folder} (looked for {", ".join(spellings)}).\n'
    f'An IDX data set is four files, gzipped (.gz) or not: {wanted}.\n'
    f'{_RUN_EMBEDDED}'
  )


@functools.lru_cache(maxsize=8)
def _load_tfds(name: str, folder: pathlib.Path, split: str) -> TfdsSource:
  """Opens one split of the newest array_record copy under a folder."""
  # Imported here: the other sources do without it.
  import tensorflow_datasets as tfds

  builder = _find_array_record_copy(name, folder)
  tfds_split = _TFDS[name].test_split if split == 'test' else split
  if tfds_split not in builder.info.splits:
    raise DatasetNotFoundError(
      f'The copy in {builder.data_dir} has no split {tfds_split!r}, only'
      f' {sorted(builder.info.splits)}.\n{_how_to_prepare(name, folder)}'
    )
  records = builder.as_data_source(
    tfds_split,
    decoders={'image': tfds.decode.SkipDecoding()},
    file_format='array_record',
  )
  return TfdsSource(f'{builder.data_dir}, {tfds_split}', records)


def _find_array_record_copy(name: str, folder: pathlib.Path):
  """The TFDS builder of the newest version that gives random access."""
  import tensorflow_datasets as tfds

  versions = [
    path.parent.name
    for path in (folder / name).glob('*/dataset_info.json')
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  if not versions:
    raise DatasetNotFoundError(
      f'Data set {name!r} not found (looked for'
      f' {folder / name}/VERSION/dataset_info.json).\n'
      f'{_how_to_prepare(name, folder)}'
    )
  for version in sorted(versions, key=tfds.core.Version, reverse=True):
    builder = tfds.builder_from_directory(folder / name / version)
    formats = {form.value for form in builder.info.available_file_formats()}
    if 'array_record' in formats:
      return builder
  raise DatasetNotFoundError(
    f'The copy in {builder.data_dir} is {", ".join(sorted(formats))}, which'
    ' gives no random access; an array_record copy is needed, in a data_dir'
    f' of its own.\n{_how_to_prepare(name, "DIR")}'
  )


def _how_to_prepare(name: str, folder: pathlib.Path | str) -> str:
  """Tells how to get an array_record copy, and how to do without."""
  command = f'tfds build {name} --file_format=array_record --data_dir={folder}'
  manual_files = _TFDS[name].manual_files
  if manual_files:
    command += ' --manual_dir=MANUAL_DIR'
  lines = [
    'Prepare it once (needs TensorFlow: pip install -e ".[tf]"):',
    f'  {command}',
  ]
  if manual_files:
    lines.append(
      f'where MANUAL_DIR holds {" and ".join(manual_files)}, from'
      ' https://image-net.org.'
    )
  return '\n'.join([*lines, _RUN_EMBEDDED])
