"""Folders of pictures: one sub-folder a class.

    DIR/train/CLASS/**, DIR/val/CLASS/**       two splits
    DIR/CLASS/**                               split by the names of the files

The first may be called `training`; the second `test`, `testing`, `val`, `valid`
or `validation`, of which the first that is there counts; any case will do.
Classes are the top folders, sorted; what lies in deeper ones belongs to them.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from ds_jax.data import decoding, source

ENDINGS = (
  *('.jpg', '.jpeg', '.jfif', '.png', '.gif', '.webp', '.bmp', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.avif'),
)
_TRAIN_NAMES = ('train', 'training')
_TEST_NAMES = ('test', 'testing', 'val', 'valid', 'validation')
# Names in one line of the log.
_MAX_NAMED = 5
_CHUNK = 1 << 20


class FolderSource:
  """The pictures of one split.

  Attributes:
    labels: (N,) int32.
    class_names: of the labels.
  """

  def __init__(
    self, paths: Sequence[pathlib.Path], labels, class_names: tuple[str, ...]
  ):
    self.paths = paths
    self.labels = np.asarray(labels, np.int32)
    self.class_names = class_names

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict:
    picture = decoding.from_file(self.paths[index])
    return {'image': picture, 'label': int(self.labels[index])}

  def __repr__(self) -> str:
    return f'FolderSource({len(self)} in {len(self.class_names)} classes)'


@dataclasses.dataclass(frozen=True)
class _File:
  """A picture: its class, and its path below that of the class."""

  label: str
  path: pathlib.Path
  place: str


@functools.lru_cache(maxsize=4)
def load(
  folder: pathlib.Path, test_share: float, drop_copies: bool
) -> dict[str, FolderSource]:
  """Lists both splits; what is odd about them is said in the log, by name.

  Args:
    folder: DIR.
    test_share: of the pictures, for the test split, where there is none. The
      place of a file is decided by its path below DIR, so that one that is
      added moves no other.
    drop_copies: whether test files with the content of a train file are left
      out; reads as much of the files as it takes to tell.

  Returns:
    `train` and `test`.

  Raises:
    DatasetNotFoundError: if there is no such folder, or no picture in it.
  """
  if not folder.is_dir():
    raise source.DatasetNotFoundError(
      f'There is no folder {folder}.\n{source.RUN_EMBEDDED}'
    )
  train, test = _splits(folder, test_share)
  if drop_copies:
    test = _without_copies(train, test)
  found = [{file.label for file in files} for files in (train, test)]
  for split, missing in (
    ('test', found[0] - found[1]),
    ('train', found[1] - found[0]),
  ):
    if missing:
      logging.warning(
        '%d classes of %s have no picture in the %s split: %s',
        len(missing),
        folder,
        split,
        _some(missing),
      )
  names = tuple(sorted(found[0] | found[1]))
  numbers = {name: i for i, name in enumerate(names)}
  return {
    split: FolderSource(
      [file.path for file in files],
      [numbers[file.label] for file in files],
      names,
    )
    for split, files in (('train', train), ('test', test))
  }


def pictures(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives the pictures in a folder and those below, in order.

  Hidden files and folders are passed over; links are followed, but for those
  that lead back to a folder that they are in.

  Args:
    folder: where to look.
  """
  yield from _walk(folder, ())


def is_picture(path: pathlib.Path) -> bool:
  """Whether a file's name ends as those of pictures do, in any case."""
  return path.suffix.lower() in ENDINGS


def _walk(folder, above):
  stat = folder.stat()
  place = stat.st_dev, stat.st_ino
  if place in above:
    logging.warning('%s leads back to a folder that it is in.', folder)
    return
  entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  for entry in entries:
    path = folder / entry.name
    if entry.name.startswith('.'):
      continue
    if entry.is_dir():
      yield from _walk(path, (*above, place))
    elif entry.is_file() and is_picture(path):
      yield path


def _splits(folder, test_share) -> tuple[list[_File], list[_File]]:
  by_name = {path.name.lower(): path for path in _folders(folder)}
  train = next((by_name[n] for n in _TRAIN_NAMES if n in by_name), None)
  tests = [by_name[name] for name in _TEST_NAMES if name in by_name]
  # A class may have such a name, but a split has folders in it.
  is_split = train is not None and bool(_folders(train))
  if tests and not is_split and len(by_name) < 3:
    raise source.DatasetNotFoundError(
      f'{folder} has {tests[0].name}, but no train with a folder for each'
      ' class. Expected DIR/train/CLASS and DIR/val/CLASS, or DIR/CLASS.\n'
      f'{source.RUN_EMBEDDED}'
    )
  used = [train, *tests[:1]]
  unused = [path.name for path in by_name.values() if path not in used]
  if is_split and unused:
    logging.warning('Not read in %s: %s', folder, _some(unused))
  if is_split and tests:
    return _files(train), _files(tests[0])
  files = _files(train if is_split else folder)
  is_test = [
    source.share_of(f'{file.label}/{file.place}') < test_share for file in files
  ]
  train = [file for file, test in zip(files, is_test, strict=True) if not test]
  test = [file for file, test in zip(files, is_test, strict=True) if test]
  return train, test


def _folders(folder) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.iterdir()
    if path.is_dir() and not path.name.startswith('.')
  )


def _files(root) -> list[_File]:
  """Lists the pictures of the classes in a folder, by class and path."""
  files, empty = [], []
  for folder in _folders(root):
    found = [
      _File(folder.name, path, path.relative_to(folder).as_posix())
      for path in pictures(folder)
    ]
    files += found
    if not found:
      empty.append(folder.name)
  if not files:
    raise source.DatasetNotFoundError(
      f'No pictures in {root}: expected a sub-folder for each class, with files'
      f' that end in {", ".join(ENDINGS)}.\n{source.RUN_EMBEDDED}'
    )
  if empty:
    logging.warning(
      '%d folders of %s have no picture, and are no classes: %s',
      len(empty),
      root,
      _some(empty),
    )
  return files


def _without_copies(train, test) -> list[_File]:
  """Returns the test files that are no copies of a train file."""
  groups = _copies([*train, *test])
  in_train = set(train)
  under_two = [g for g in groups if len({file.label for file in g}) > 1]
  if under_two:
    logging.warning(
      '%d pictures lie in several classes: %s',
      len(under_two),
      _some('; '.join(str(file.path) for file in g) for g in under_two),
    )
  dropped = {
    file
    for group in groups
    if not in_train.isdisjoint(group)
    for file in group
    if file not in in_train
  }
  if groups:
    logging.info(
      '%d files are copies of others.', sum(len(group) - 1 for group in groups)
    )
  if dropped:
    logging.warning(
      '%d test pictures are copies of training ones, and left out'
      ' (dataset.drop_copies): %s',
      len(dropped),
      _some(str(file.path) for file in dropped),
    )
  return [file for file in test if file not in dropped]


def _copies(files: Sequence[_File]) -> list[list[_File]]:
  """Returns the groups of files that have the same content."""
  groups = [list(files)]
  # Each key costs more than the one before, and is asked of fewer files.
  for key in (_size, _start, _digest):
    groups = [part for group in groups for part in _parts(group, key)]
  return groups


def _parts(group, key) -> Iterable[list[_File]]:
  parts = collections.defaultdict(list)
  for file in group:
    parts[key(file.path)].append(file)
  return (part for part in parts.values() if len(part) > 1)


def _size(path):
  return path.stat().st_size


def _start(path):
  with path.open('rb') as file:
    return file.read(4096)


def _digest(path):
  digest = hashlib.sha256()
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.digest()


def _some(names: Iterable[str]) -> str:
  names = sorted(names)
  more = len(names) - _MAX_NAMED
  return ', '.join(names[:_MAX_NAMED]) + (f' and {more} more' * (more > 0))
