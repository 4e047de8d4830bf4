"""Array_record copies of TFDS data sets, read without TensorFlow."""

import dataclasses
import functools
import pathlib

from ds_jax.data import source


@dataclasses.dataclass(frozen=True)
class Facts:
  """Constants of a data set of TFDS; mean and std in units of pixel / 255."""

  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  test_split: str = 'test'
  # Files that TFDS can't fetch by itself.
  manual_files: tuple[str, ...] = ()


_FACTS = {
  'cifar10': Facts(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  'cifar100': Facts(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
  'fashion_mnist': Facts(10, (0.2860,) * 3, (0.3530,) * 3),
  'imagenet2012': Facts(
    1000,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    test_split='validation',
    manual_files=('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'),
  ),
}
NAMES = tuple(_FACTS)


def facts_of(name: str) -> Facts | None:
  """Returns what is known of a data set, whatever its version."""
  return _FACTS.get(name.partition(':')[0])


@functools.lru_cache(maxsize=8)
def load(
  name: str, path: pathlib.Path, split: str, test_share: float
) -> source.Source:
  """Opens one split of the newest array_record copy under a folder.

  Args:
    name: `NAME[/CONFIG][:VERSION]`.
    path: of the folder with TFDS copies.
    split: `train` or `test`.
    test_share: as of `source.open_either`.

  Raises:
    DatasetNotFoundError: if there is none, or no such split.
    ValueError: unless there is one image and one class label.
  """
  # Imported here: the other sources do without it.
  import tensorflow_datasets as tfds

  builder = _find_array_record_copy(name, path)
  image, label = _keys(name, builder.info)
  splits = list(builder.info.splits)
  facts = facts_of(name)
  if facts:
    expected = facts.test_split if split == 'test' else split
    if expected not in splits:
      raise source.DatasetNotFoundError(
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
    return source.EncodedSource(
      f'{builder.data_dir}, {tfds_split}',
      records,
      builder.info.features[label].names,
      (image, label),
    )

  return source.open_either(
    str(builder.data_dir), splits, split, open_split, test_share
  )


def _keys(name, info) -> tuple[str, str]:
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
    raise source.DatasetNotFoundError(
      f'Data set {name!r} not found (looked for'
      f' {folder_path / place}/{wanted or "VERSION"}/dataset_info.json).\n'
      f'{_how_to_prepare(name, folder_path)}'
    )
  for version in sorted(versions, key=tfds.core.Version, reverse=True):
    builder = tfds.builder_from_directory(folder_path / place / version)
    formats = {form.value for form in builder.info.available_file_formats()}
    if 'array_record' in formats:
      return builder
  raise source.DatasetNotFoundError(
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
  facts = facts_of(name)
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
  return '\n'.join([*lines, source.RUN_EMBEDDED])
