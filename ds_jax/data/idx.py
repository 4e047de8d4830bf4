"""The IDX file format of MNIST and its relatives, and folders of four.

A file is a four-byte magic (0, 0, type code, number of dimensions), one
big-endian uint32 a dimension, then the values. Only unsigned bytes are read.
"""

import functools
import math
import pathlib
import struct
import zlib

import numpy as np

from ds_jax.data import source

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b'\x1f\x8b'
_PREFIX = {'train': 'train', 'test': 't10k'}


@functools.lru_cache(maxsize=4)
def load(folder: pathlib.Path, split: str) -> source.GreySource:
  """Reads one split's image and label files.

  Args:
    folder: holds the four files.
    split: `train` or `test`.

  Raises:
    DatasetNotFoundError: if one is missing.
    ValueError: as `read_idx`, or for other numbers of images and labels.
  """
  prefix = _PREFIX[split]
  images_path = _find_idx(folder, f'{prefix}-images', num_dims=3)
  labels_path = _find_idx(folder, f'{prefix}-labels', num_dims=1)
  images = read_idx(images_path, num_dims=3)
  labels = read_idx(labels_path, num_dims=1)
  if len(images) != len(labels):
    raise ValueError(
      f'{images_path} has {len(images)} images, but {labels_path} has'
      f' {len(labels)} labels.'
    )
  return source.GreySource(f'idx:{folder}, {split}', images, labels)


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
    for prefix in _PREFIX.values()
    for content in ('images-idx3', 'labels-idx1')
  )
  raise source.DatasetNotFoundError(
    f'No {stem} file in {folder} (looked for {", ".join(spellings)}).\n'
    f'An IDX data set is four files, gzipped (.gz) or not: {wanted}.\n'
    f'{source.RUN_EMBEDDED}'
  )


def read_idx(path: pathlib.Path, num_dims: int) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, gzipped or not.

  Args:
    path: the file; gzip is told by its content, not by its name.
    num_dims: how many dimensions it must have: 3 for images, 1 for labels.

  Returns:
    uint8, read-only, of the shape in the file's header.

  Raises:
    ValueError: if the file is not such an IDX file, or is cut short or too
      long.
  """
  content = _decompressed(path)
  header_size = 4 + 4 * num_dims
  magic = bytes([0, 0, _UNSIGNED_BYTE, num_dims])
  if content[:4] != magic:
    raise ValueError(
      f'{path} is not an IDX file of unsigned bytes in {num_dims} dimensions:'
      f' it starts with {content[:4].hex()}, expected {magic.hex()}.'
    )
  if len(content) < header_size:
    raise ValueError(
      f'{path} ends inside its header: expected at least {header_size} bytes,'
      f' found {len(content)}.'
    )
  shape = struct.unpack(f'>{num_dims}I', content[4:header_size])
  expected = header_size + math.prod(shape)
  if len(content) != expected:
    raise ValueError(
      f'{path} is damaged: its header says shape {shape}, so expected'
      f' {expected} bytes, found {len(content)}.'
    )
  return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _decompressed(path: pathlib.Path) -> bytes:
  """The file's bytes; of a gzip file cut short, those that are there."""
  content = path.read_bytes()
  if not content.startswith(_GZIP_MAGIC):
    return content
  try:
    # Unlike the gzip module this gives what came before the cut, so that the
    # error can say how much is missing.
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(content)
  except zlib.error as error:
    raise ValueError(f'{path} is a damaged gzip file: {error}.') from error
