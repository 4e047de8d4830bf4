"""Tests of reading IDX files, whose bytes are written out here by hand."""

import gzip
import pathlib
import struct

import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import data
from ds_jax.data import idx, sources


def idx_bytes(values: np.ndarray) -> bytes:
  header = b'\x00\x00\x08' + bytes([values.ndim])
  return header + struct.pack(f'>{values.ndim}I', *values.shape) + bytes(values)


def write_split(folder, prefix, images, labels, mark='-', compress=False):
  ending = '.gz' if compress else ''
  for content, values in (('images', images), ('labels', labels)):
    encoded = idx_bytes(values)
    path = folder / f'{prefix}-{content}{mark}idx{values.ndim}-ubyte{ending}'
    path.write_bytes(gzip.compress(encoded) if compress else encoded)


class IdxTest(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def make_data(self, tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    self.folder = tmp_path
    self.images = rng.integers(0, 256, (5, 7, 6), np.uint8)
    self.labels = np.array([3, 0, 2, 1, 3], np.uint8)

  @parameterized.product(mark=['-', '.'], compress=[False, True])
  def test_source_gives_the_files_pixels_and_labels(self, mark, compress):
    write_split(self.folder, 'train', self.images, self.labels, mark, compress)
    source = data.load_source(f'idx:{self.folder}', 'train')
    assert len(source) == 5
    for i, label in enumerate(self.labels):
      assert source[i]['label'] == label
      assert source[i]['image'].shape == (7, 6, 3)
      for channel in range(3):
        np.testing.assert_array_equal(
          source[i]['image'][:, :, channel], self.images[i]
        )

  def test_folder_may_be_given_as_data_dir(self):
    write_split(self.folder, 'train', self.images, self.labels)
    write_split(self.folder, 't10k', self.images[:2], self.labels[:2])
    info = sources.dataset_info('idx', str(self.folder))
    assert (info.num_train, info.num_test, info.num_classes) == (5, 2, 4)

  @parameterized.parameters(False, True)
  def test_truncated_file_is_refused_with_both_sizes(self, compress):
    write_split(
      self.folder, 'train', self.images, self.labels, compress=compress
    )
    (path,) = self.folder.glob('train-images*')
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match='expected 226 bytes, found') as error:
      data.load_source(f'idx:{self.folder}', 'train')
    assert str(path) in str(error.value)
    found = int(str(error.value).split('found ')[1].rstrip('.'))
    assert found < 226 and (compress or found == 206)

  def test_trailing_bytes_are_refused(self):
    path = self.folder / 'labels'
    path.write_bytes(idx_bytes(self.labels) + b'\x00')
    with pytest.raises(ValueError, match='expected 13 bytes, found 14'):
      idx.read_idx(path, num_dims=1)

  def test_cut_header_is_refused(self):
    path = self.folder / 'images'
    path.write_bytes(idx_bytes(self.images)[:10])
    with pytest.raises(ValueError, match='inside its header.*16.*found 10'):
      idx.read_idx(path, num_dims=3)

  def test_corrupt_gzip_is_refused(self):
    path = self.folder / 'images.gz'
    content = bytearray(gzip.compress(idx_bytes(self.images)))
    content[-8] ^= 1  # the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged gzip'):
      idx.read_idx(path, num_dims=3)

  def test_labels_are_not_taken_for_images(self):
    path = self.folder / 'labels'
    path.write_bytes(idx_bytes(self.labels))
    with pytest.raises(ValueError, match='00000801, expected 00000803'):
      idx.read_idx(path, num_dims=3)

  def test_counts_must_agree(self):
    write_split(self.folder, 'train', self.images, self.labels[:4])
    with pytest.raises(ValueError, match='5 images, but .* has 4 labels'):
      data.load_source(f'idx:{self.folder}', 'train')

  def test_missing_file_error_names_folder_files_and_way_out(self):
    write_split(self.folder, 'train', self.images, self.labels)
    with pytest.raises(data.DatasetNotFoundError) as error:
      data.load_source(f'idx:{self.folder}', 'test')
    for part in (
      str(self.folder),
      't10k-images-idx3-ubyte.gz',
      'train-labels-idx1-ubyte',
      '--config.dataset.name=digits',
    ):
      assert part in str(error.value)
