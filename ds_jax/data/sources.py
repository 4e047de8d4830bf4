"""Random-access image sources by name.

A source has a length and gives an `Example` for an index. Nothing here
downloads: a data set that is not on disk raises `DatasetNotFoundError`, which
says how to prepare it. `digits` is embedded.

Axes: N images, H, W.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from PIL import Image

from ds_jax import paths
from ds_jax.data import decoding, folder
from ds_jax.data.idx import read_idx


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
_KNOWN = (
  *('digits', 'idx:DIR', 'imagefolder:DIR', 'hf:DIR'),
  *('tfds:NAME[/CONFIG][:VERSION]', 'MODULE:FUNCTION', *_TFDS),
)
_IDX_PREFIX = {'train': 'train', 'test': 't10k'}
_NUM_DIGITS_TRAIN = 1437
_DIGITS_SIZE = 32

_RUN_EMBEDDED = (
  'To run without it, take the embedded data set:'
  ' --config.dataset.name=digits (or another model on it:'
  ' --config=configs/ds_digits.py).'
)


def load_source(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  test_share: float = 0.2,
  drop_copies: bool = True,
) -> Source:
  """Opens one split of a data set.

  Args:
    name: `digits`; `idx:DIR`, four IDX files; `imagefolder:DIR`, a folder with
      one of pictures for each class (see `ds_jax.data.folder`); `hf:DIR`, a
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
    drop_copies: as of `ds_jax.data.folder.load`.

  Returns:
    The source. Loading the same one again returns the same object.

  Raises:
    DatasetNotFoundError: if the data are not there, or not as array_record.
    ImportError: if a package or the module is missing.
    ValueError: if the name or the split is unknown, or a file is damaged.
  """
  if split not in ('train', 'test'):
    raise ValueError(f"Unknown split {split!r}; known: 'train', 'test'.")
  kind, rest, folder_path = _parse_name(name, data_dir)
  if kind == 'digits':
    return _load_digits()[split]
  if kind == 'idx':
    return _load_idx(folder_path, split)
  if kind == 'imagefolder':
    try:
      return folder.load(folder_path, test_share, drop_copies)[split]
    except folder.FolderError as error:
      raise DatasetNotFoundError(f'{error}\n{_RUN_EMBEDDED}') from error
  if kind == 'hf':
    return _load_hugging_face(folder_path, split, test_share)
  if kind == 'tfds':
    return _load_tfds(rest, folder_path, split, test_share)
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
  for split, source in (('train', train), ('test', test)):
    if not len(source):
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


def _labels_of(source: Source) -> np.ndarray:
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
  facts = _TFDS.get(rest.partition(':')[0])
  if kind == 'tfds' and facts:
    return facts.mean, facts.std
  return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


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


def _parse_name(
  name: str, data_dir: str | None
) -> tuple[str, str, pathlib.Path]:
  """Returns a name's kind, what follows it, and where the data are."""
  kind, _, rest = name.partition(':')
  if name == 'digits':
    return name, '', pathlib.Path()
  if kind in ('idx', 'imagefolder', 'hf') and (rest or data_dir):
    return kind, '', pathlib.Path(paths.expanded(rest or data_dir))
  if name in _TFDS:
    kind, rest = 'tfds', name
  if kind == 'tfds' and rest:
    default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    return kind, rest, pathlib.Path(paths.expanded(data_dir or default))
  is_own = all(part.isidentifier() for part in [*kind.split('.'), rest])
  if not is_own or kind in ('digits', *_TFDS):
    raise ValueError(f'Unknown data set {name!r}; known: {", ".join(_KNOWN)}.')
  return kind, rest, pathlib.Path()


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


@functools.lru_cache(maxsize=4)
def _load_own(module: str, function: str, split: str) -> Source:
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


@functools.lru_cache(maxsize=8)
def _load_hugging_face(
  path: pathlib.Path, split: str, test_share: float
) -> Source:
  """Opens one split of a data set that `datasets` has saved to disk."""
  try:
    # Imported here: an option.
    import datasets
  except ImportError as error:
    raise ImportError(
      "hf:DIR needs the package datasets: pip install -e '.[hf]'."
    ) from error
  try:
    found = datasets.load_from_disk(str(path))
  except FileNotFoundError as error:
    raise DatasetNotFoundError(
      f'No data set in {path}: expected what save_to_disk of Hugging Face'
      f' datasets has written. {error}\n{_RUN_EMBEDDED}'
    ) from error
  splits = {'train': found} if not isinstance(found, dict) else dict(found)

  def open_split(name):
    records = splits[name]
    images, labels = (
      [k for k, column in records.features.items() if isinstance(column, kind)]
      for kind in (datasets.Image, datasets.ClassLabel)
    )
    if len(images) != 1 or len(labels) != 1:
      raise ValueError(
        f'{path} has the image columns {images} and the label columns {labels};'
        ' expected one of each: select_columns, and cast the label to'
        ' ClassLabel.'
      )
    names = records.features[labels[0]].names
    records = records.cast_column(images[0], datasets.Image(decode=False))
    keys = images[0], labels[0]
    return EncodedSource(f'{path}, {name}', records, names, keys)

  return _split_of(str(path), splits, split, open_split, test_share)


def _split_of(
  where: str,
  splits: Sequence[str],
  split: str,
  open_split: Callable[[str], Source],
  test_share: float,
) -> Source:
  """Opens the train split, or the one to test, whatever it is called."""
  if 'train' not in splits:
    raise DatasetNotFoundError(
      f'The copy in {where} has no split train, only {sorted(splits)}.'
    )
  tests = [name for name in ('test', 'validation') if name in splits]
  if tests and split == 'train':
    return open_split('train')
  for name in tests:
    source = open_split(name)
    # Some sets keep the labels of their test split to themselves.
    if not len(source) or source[0]['label'] >= 0:
      return source
  source = open_split('train')
  is_test = np.array(
    [folder.share_of(str(i)) < test_share for i in range(len(source))]
  )
  return Subset(source, np.flatnonzero(is_test == (split == 'test')))


@functools.lru_cache(maxsize=8)
def _load_tfds(
  name: str, path: pathlib.Path, split: str, test_share: float
) -> Source:
  """Opens one split of the newest array_record copy under a folder."""
  # Imported here: the other sources do without it.
  import tensorflow_datasets as tfds

  builder = _find_array_record_copy(name, path)
  image, label = _tfds_keys(name, builder.info)
  splits = list(builder.info.splits)
  facts = _TFDS.get(name.partition(':')[0])
  if facts:
    expected = facts.test_split if split == 'test' else split
    if expected not in splits:
      raise DatasetNotFoundError(
        f'The copy in {builder.data_dir} has no split {expected!r}, only'
        f' {sorted(splits)}.\n{_how_to_prepare(name, path)}'
      )
    # ImageNet's own test split has no labels.
    splits = ['train', expected]

  def open_split(tfds_split):
    records = builder.as_data_source(
      tfds_split,
      decoders={image: tfds.decode.SkipDecoding()},
      file_format='array_record',
    )
    return EncodedSource(
      f'{builder.data_dir}, {tfds_split}',
      records,
      builder.info.features[label].names,
      (image, label),
    )

  return _split_of(str(builder.data_dir), splits, split, open_split, test_share)


def _tfds_keys(name, info) -> tuple[str, str]:
  """The features of a data set that are its image and its label."""
  import tensorflow_datasets as tfds

  found = tuple(
    [key for key, feature in info.features.items() if isinstance(feature, kind)]
    for kind in (tfds.features.Image, tfds.features.ClassLabel)
  )
  keys = info.supervised_keys or ()
  for i, candidates in enumerate(found):
    if len(candidates) > 1:
      found[i][:] = [key for key in candidates if key in keys]
  if [len(candidates) for candidates in found] != [1, 1]:
    raise ValueError(
      f'tfds:{name} has the features {sorted(info.features)}: expected one'
      ' image and one class label.'
    )
  return found[0][0], found[1][0]


def _find_array_record_copy(name: str, folder_path: pathlib.Path):
  """The TFDS builder of the newest version that gives random access."""
  import tensorflow_datasets as tfds

  place, _, wanted = name.partition(':')
  versions = [
    path.parent.name
    for path in (folder_path / place).glob('*/dataset_info.json')
    if tfds.core.Version.is_valid(path.parent.name)
    and wanted in ('', path.parent.name)
  ]
  if not versions:
    raise DatasetNotFoundError(
      f'Data set {name!r} not found (looked for'
      f' {folder_path / place}/{wanted or "VERSION"}/dataset_info.json).\n'
      f'{_how_to_prepare(name, folder_path)}'
    )
  for version in sorted(versions, key=tfds.core.Version, reverse=True):
    builder = tfds.builder_from_directory(folder_path / place / version)
    formats = {form.value for form in builder.info.available_file_formats()}
    if 'array_record' in formats:
      return builder
  raise DatasetNotFoundError(
    f'The copy in {builder.data_dir} is {", ".join(sorted(formats))}, which'
    ' gives no random access; an array_record copy is needed. Make one of it'
    ' (needs TensorFlow: pip install -e ".[tf]"):\n'
    f'  tfds convert_format --dataset_version_dir={builder.data_dir}'
    f' --out_file_format=array_record --out_dir=DIR/{place}/{version}\n'
    'and set dataset.data_dir=DIR; or build it anew.\n'
    f'{_how_to_prepare(name, "DIR")}'
  )


def _how_to_prepare(name: str, folder_path: pathlib.Path | str) -> str:
  """Tells how to get an array_record copy, and how to do without."""
  command = (
    f'tfds build {name} --file_format=array_record --data_dir={folder_path}'
  )
  facts = _TFDS.get(name.partition(':')[0])
  manual_files = facts.manual_files if facts else ()
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
