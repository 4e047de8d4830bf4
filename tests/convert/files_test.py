"""Tests of reading files of weights."""

import argparse
import importlib.util
import sys

import numpy as np
import pytest
import safetensors.numpy

from ds_jax import convert

STATE = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': np.ones((), np.float32),
}


def assert_same(found):
  assert found.keys() == STATE.keys()
  for name, array in STATE.items():
    np.testing.assert_array_equal(found[name], array)


def test_npz(tmp_path):
  np.savez(tmp_path / 'x.npz', **STATE)
  assert_same(convert.read(tmp_path / 'x.npz'))


def test_safetensors(tmp_path):
  path = tmp_path / 'x.safetensors'
  safetensors.numpy.save_file(STATE, path)
  assert_same(convert.read(str(path)))


def test_torch(tmp_path):
  torch = pytest.importorskip('torch')
  tensors = {name: torch.from_numpy(array) for name, array in STATE.items()}
  torch.save({'model': tensors, 'args': argparse.Namespace()}, tmp_path / 'x')
  assert_same(convert.read(tmp_path / 'x'))


@pytest.mark.parametrize('name', ['x.npz', 'x.safetensors'])
def test_a_damaged_file_is_a_plain_error(tmp_path, name):
  (tmp_path / name).write_bytes(b'PK\x03\x04 and no more than that')
  with pytest.raises(ValueError, match=f'{name} is damaged'):
    convert.read(tmp_path / name)


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
  np.savez(tmp_path / 'x.npz', a=np.array([{}], object))
  with pytest.raises(ValueError, match='holds more than arrays'):
    convert.read(tmp_path / 'x.npz')


@pytest.mark.parametrize('name', ['x.npz', 'x.safetensors', 'x.pth', 'x'])
def test_a_file_that_is_not_there(tmp_path, name):
  with pytest.raises(
    FileNotFoundError, match=f'There is no .*{name}; expected'
  ):
    convert.read(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
  with pytest.raises(IsADirectoryError, match='folder without checkpoints/'):
    convert.read(tmp_path)


def test_safetensors_missing_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
  with pytest.raises(ImportError, match=r'pip install -e "\.\[safetensors\]"'):
    convert.read(_existing(tmp_path / 'x.safetensors'))


def test_torch_missing_says_how_to_get_it(tmp_path):
  if importlib.util.find_spec('torch'):
    pytest.skip('PyTorch is installed.')
  with pytest.raises(ImportError, match=r'pip install -e "\.\[torch\]"'):
    convert.read(_existing(tmp_path / 'x.pth'))


def _existing(path):
  path.write_bytes(b'')
  return path
