"""Data sets by name.

Nothing here downloads: a data set that is not on disk raises
`DatasetNotFoundError`, which says how to prepare it. `digits` is embedded.

Axes: N images, H, W.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
from typing import Any

import numpy as np

from ds_jax import paths
from ds_jax.data import digits, folders, hugging_face, idx, tfds_copies
from ds_jax.data import source as source_lib

_KNOWN = (
  *('digits', 'idx:DIR', 'imagefolder:DIR', 'hf:DIR'),
  *('tfds:NAME[/CONFIG][:VERSION]', 'MODULE:FUNCTION', *tfds_copies.NAMES),
)


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
    class_names: of the labels; the numbers themselves where they have no other.
    mean: of each channel, in units of pixel / 255.
    std: of each channel, in the same units.
  """

  name: str
  num_train: int
  num_test: int
  num_classes: int
  labels: tuple[int, int] | None
  class_names: tuple[str, ...]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


def load_source(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  test_share: float = 0.2,
  drop_copies: bool = True,
) -> source_lib.Source:
  """Opens one split of a data set.

  Args:
    name: `digits`; `idx:DIR`, four IDX files; `imagefolder:DIR`, a folder with
      one of pictures for each class (see `ds_jax.data.folders`); `hf:DIR`, a
      data set of Hugging Face `datasets` saved there;
      `tfds:NAME[/CONFIG][:VERSION]`, an array_record copy of TFDS, for which
      `cifar10`, `cifar100`, `fashion_mnist` and `imagenet2012` are short; or
      `MODULE:FUNCTION`, which takes the split and returns a source of one's
      own.
    split: 'train' or 'test'; the latter is the validation split of a data set
      that has that, but no labelled images to test.
    data_dir: where TFDS copies are; None or '' means $TFDS_DATA_DIR, else
      ~/tensorflow_datasets. Or DIR, for a name without one.
    test_share: of the images, for the test split, where there is none.
    drop_copies: as of `ds_jax.data.folders.load`.

  Returns:
    The source. Loading the same one again returns the same object.

  Raises:
    DatasetNotFoundError: if the data are not there, or not as array_record.
    ImportError: if a package or the module is missing.
    ValueError: if the name or the split is unknown, or a file is damaged.
  """
  if split not in ('train', 'test'):
    raise ValueError(f"Unknown split {split!r}; known: 'train', 'test'.")
  kind, rest, folder = _parse_name(name, data_dir)
  if kind == 'digits':
    return digits.load()[split]
  if kind == 'idx':
    return idx.load(folder, split)
  if kind == 'imagefolder':
    return folders.load(folder, test_share, drop_copies)[split]
  if kind == 'hf':
    return hugging_face.load(folder, split, test_share)
  if kind == 'tfds':
    return tfds_copies.load(rest, folder, split, test_share)
  return _load_own(kind, rest, split)


def dataset_info(
  name: str, data_dir: str | None = None, **options: Any
) -> DatasetInfo:
  """Describes a data set that is on disk.

  Args:
    name: as in `load_source`.
    data_dir: as in `load_source`.
    **options: as in `load_source`.

  Returns:
    Sizes as found on disk; mean and std as in `channel_statistics`.

  Raises:
    DatasetNotFoundError: as `load_source`.
    ValueError: as `load_source`, or for a split without images.
  """
  train = load_source(name, 'train', data_dir, **options)
  test = load_source(name, 'test', data_dir, **options)
  for split, images in (('train', train), ('test', test)):
    if not len(images):
      raise ValueError(
        f'The {split} split of {name!r} has no images. Put some there.'
      )
  class_names = getattr(train, 'class_names', None)
  labels = None
  if class_names is None:
    found = np.concatenate([_labels_of(train), _labels_of(test)])
    labels = int(found.min()), int(found.max())
    class_names = map(str, range(1 + labels[1]))
  class_names = tuple(class_names)
  mean, std = channel_statistics(name)
  return DatasetInfo(
    name=name,
    num_train=len(train),
    num_test=len(test),
    num_classes=len(class_names),
    labels=labels,
    class_names=class_names,
    mean=mean,
    std=std,
  )


def _labels_of(source: source_lib.Source) -> np.ndarray:
  if hasattr(source, 'labels'):
    return np.asarray(source.labels)
  return np.array([source[i]['label'] for i in range(len(source))])


def channel_statistics(
  name: str,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
  """Mean and standard deviation of a data set's channels; reads no data.

  Args:
    name: as in `load_source`; 'idx' needs no folder here.

  Returns:
    (mean, std), each of R, G, B in units of pixel / 255: the usual constants
    of the four TFDS data sets that have a name of their own. Of others nothing
    is assumed: 0.5 and 0.5 take pixels to -1 .. 1.

  Raises:
    ValueError: if the name is unknown.
  """
  kind, rest, _ = _parse_name(name, data_dir='any')
  facts = tfds_copies.facts_of(rest)
  if kind == 'tfds' and facts:
    return facts.mean, facts.std
  return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def _parse_name(
  name: str, data_dir: str | None
) -> tuple[str, str, pathlib.Path]:
  """Returns a name's kind, what follows it, and where the data are."""
  kind, _, rest = name.partition(':')
  if name == 'digits':
    return name, '', pathlib.Path()
  if kind in ('idx', 'imagefolder', 'hf') and (rest or data_dir):
    return kind, '', pathlib.Path(paths.expanded(rest or data_dir))
  if name in tfds_copies.NAMES:
    kind, rest = 'tfds', name
  if kind == 'tfds' and rest:
    default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    return kind, rest, pathlib.Path(paths.expanded(data_dir or default))
  is_own = all(part.isidentifier() for part in [*kind.split('.'), rest])
  if not is_own or kind in ('digits', *tfds_copies.NAMES):
    raise ValueError(f'Unknown data set {name!r}; known: {", ".join(_KNOWN)}.')
  return kind, rest, pathlib.Path()


@functools.lru_cache(maxsize=4)
def _load_own(module: str, function: str, split: str) -> source_lib.Source:
  """Calls a user's function."""
  name = f'{module}:{function}'
  try:
    make = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise ImportError(
      f'dataset.name={name!r}: {error}. Expected a function of a module that'
      ' can be imported from here (PYTHONPATH).'
    ) from error
  source = make(split)
  if not (hasattr(source, '__len__') and hasattr(source, '__getitem__')):
    raise ValueError(
      f'{name}({split!r}) returned a {type(source).__name__}; expected an'
      ' object with a length, that gives a dict of image and label for an'
      ' index.'
    )
  return source
