"""The IDX file format of MNIST and its relatives.

A file is a four-byte magic (0, 0, type code, number of dimensions), one
big-endian uint32 a dimension, then the values. Only unsigned bytes are read.
"""

import math
import pathlib
import struct
import zlib

import numpy as np

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b'\x1f\x8b'


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
