"""Tests of reading files of weights."""

import argparse
import collections
import contextlib
import datetime
import fractions
import importlib.util
import io
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from ds_jax import convert
from ds_jax.convert import files

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


OTHER = {name: array + 1 for name, array in STATE.items()}
OPTIMIZER = {'state': {0: {'momentum': np.ones(3)}}, 'param_groups': [{}]}


@pytest.mark.parametrize(
  'content, taken',
  [
    # timm, DeiT, torchvision's references, torch.optim.swa_utils, Lightning.
    ({'state_dict': OTHER, 'state_dict_ema': STATE}, 'state_dict_ema'),
    ({'model': OTHER, 'model_ema': STATE, 'epoch': 3}, 'model_ema'),
    ({'model': OTHER, 'model_ema': {'module': STATE}}, 'model_ema.module'),
    ({'model': OTHER, 'ema_state_dict': STATE}, 'ema_state_dict'),
    ({'model': OTHER, 'ema': {'decay': 0.9, 'shadow': STATE}}, 'ema.shadow'),
    ({'model': OTHER, 'averaged_model': STATE}, 'averaged_model'),
    ({'model': OTHER, 'avg_model': STATE}, 'avg_model'),
    ({'state_dict': {'model': OTHER, 'ema': STATE}}, 'state_dict.ema'),
    ({'model': STATE, 'optimizer': OPTIMIZER}, 'model'),
    ({'state_dict': STATE, 'criterion': OTHER}, 'state_dict'),
    ({'weights_of_mine': STATE, 'epoch': 3}, 'weights_of_mine'),
  ],
)
def test_the_average_is_taken_and_said(content, taken, caplog):
  assert_same(files.choose_state(content, 'x.pth'))
  assert f'Took {taken}' in caplog.text
  average = any(name in taken for name in ('ema', 'avg', 'averaged'))
  assert ('a moving average' in caplog.text) == average
  for name in ('model', 'state_dict', 'criterion'):
    if name in content:
      assert name in caplog.text
  assert 'optimizer' not in caplog.text


def test_a_state_is_chosen_by_its_key():
  content = {'model': STATE, 'model_ema': OTHER}
  assert_same(files.choose_state(content, 'x.pth', 'model'))
  with pytest.raises(ValueError, match="model, model_ema. .*no 'ema'"):
    files.choose_state(content, 'x.pth', 'ema')


def test_one_of_the_networks_in_a_state_is_chosen_by_its_prefix(caplog):
  state = {f'net.teacher.{name}': array for name, array in STATE.items()}
  state |= {f'net.student.{name}': array for name, array in OTHER.items()}
  for content in (state, {'state_dict': state, 'buffers': OTHER}):
    assert_same(files.choose_state(content, 'x.pth', 'net.teacher'))
    assert 'Took net.teacher.' in caplog.text
    with pytest.raises(ValueError, match="there is no 'teacher'"):
      files.choose_state(content, 'x.pth', 'teacher')


def test_an_average_without_names_is_not_passed_over_in_silence(caplog):
  # As of the package torch_ema.
  average = {'decay': 0.9, 'shadow_params': list(OTHER.values())}
  content = {'model': STATE, 'ema': average}
  assert_same(files.choose_state(content, 'x.pth'))
  assert 'have no names, which is passed over: ema.shadow_params' in caplog.text


@pytest.mark.parametrize(
  'content', [{'ema': STATE, 'swa': OTHER}, {'a': STATE, 'b': OTHER}]
)
def test_states_of_which_none_is_preferred_are_named(content):
  first, second = content
  with pytest.raises(ValueError, match=f'{first}, {second}. Choose .*--state'):
    files.choose_state(content, 'x.pth')


@pytest.mark.parametrize('content', [[STATE], {'epoch': 3}, {}, OPTIMIZER])
def test_a_file_without_a_state_is_a_plain_error(content):
  with pytest.raises(ValueError, match='x.pth holds no state'):
    files.choose_state(content, 'x.pth')


def torch_state():
  torch = pytest.importorskip('torch')
  return torch, {name: torch.from_numpy(array) for name, array in STATE.items()}


@pytest.mark.parametrize('zipped', [True, False])
def test_torch_with_harmless_things_beside_the_arrays(tmp_path, zipped):
  torch, tensors = torch_state()
  opened = collections.defaultdict(list, {'a': [1]})
  content = {
    'state_dict': {name: 0 * tensor for name, tensor in tensors.items()},
    'state_dict_ema': tensors,
    'args': argparse.Namespace(
      lr=np.float32(0.1), best=np.float64(3), output=tmp_path, epochs=[1]
    ),
    'metric': np.float64(70.1),
    'stats': np.ones(2),
    'kinds': [np.float32, int, range(3), types.SimpleNamespace(a=opened)],
    'began': datetime.datetime.now(datetime.UTC),
    'windows': pathlib.PureWindowsPath('C:/runs'),
    'optimizer': OPTIMIZER['param_groups'],
  }
  torch.save(content, tmp_path / 'x', _use_new_zipfile_serialization=zipped)
  assert_same(convert.read(tmp_path / 'x'))


def test_numpy_1_s_names_are_known(tmp_path):
  torch, tensors = torch_state()
  torch.save(
    {'model': tensors, 'metric': np.float64(3)},
    tmp_path / 'x',
    _use_new_zipfile_serialization=False,
  )
  data = (tmp_path / 'x').read_bytes()
  renamed = data.replace(b'numpy._core', b'numpy.core')
  assert renamed != data
  (tmp_path / 'x').write_bytes(renamed)
  assert_same(convert.read(tmp_path / 'x'))


def test_another_kind_is_refused_by_name(tmp_path):
  torch, tensors = torch_state()
  content = {'model': tensors, 'args': fractions.Fraction(1, 3)}
  torch.save(content, tmp_path / 'x')
  with pytest.raises(ValueError) as raised:
    convert.read(tmp_path / 'x')
  message = str(raised.value)
  assert 'of the kind fractions.Fraction, and only arrays' in message
  assert 'weights_only' not in message and '\x1b' not in message
  # Nor is PyTorch's advice, to read unsafely, in the traceback.
  assert raised.value.__cause__ is raised.value.__context__ is None


def assert_plain_error(path, message):
  with pytest.raises(ValueError, match=message) as raised:
    convert.read(path)
  assert 'weights_only' not in str(raised.value)
  assert raised.value.__context__ is None


@pytest.mark.parametrize('name', ['x.npz', 'x.safetensors'])
def test_a_damaged_file_is_a_plain_error(tmp_path, name):
  (tmp_path / name).write_bytes(b'PK\x03\x04 and no more than that')
  assert_plain_error(tmp_path / name, f'{name} is damaged')


class Torch:
  """Stands for PyTorch where it is not installed, and reads nothing."""

  def __init__(self, error):
    self._error = error
    self.serialization = self

  safe_globals = staticmethod(contextlib.nullcontext)

  def load(self, path, **_):
    raise self._error


ADVICE = 'Re-running `torch.load` with `weights_only` set to `False` will work.'


@pytest.mark.parametrize(
  'error, message',
  [
    # As torch 2.13 words them; damaged bytes make it raise anything.
    (
      pickle.UnpicklingError(
        f'Weights only load failed. {ADVICE}\nPlease file an issue with the'
        ' following: WeightsUnpickler error: \n\nUnsupported operand 60\n\nX'
      ),
      r'x is damaged, .* \(UnpicklingError: Unsupported operand 60\)\.$',
    ),
    (
      pickle.UnpicklingError(
        f'This \033[1mcan\033[0m be loaded. {ADVICE}\n\tWeightsUnpickler error:'
        ' Unsupported global: GLOBAL a.B was not an allowed global by default.'
      ),
      'x holds an object of the kind a.B, and only arrays',
    ),
    (
      RuntimeError(f'Cannot use it with TorchScript archives. {ADVICE}'),
      'x holds a program of TorchScript',
    ),
    (RuntimeError(f'Legacy. {ADVICE}'), r'x is damaged, .*\(RuntimeError\)\.$'),
    (IndexError('index out of range'), 'x is damaged, .*IndexError: index'),
    (OSError(22, 'Invalid argument'), 'x is damaged, .*Invalid argument'),
    (KeyError('13'), 'x is damaged'),
  ],
)
def test_torch_s_errors_are_told_in_our_words(
  tmp_path, monkeypatch, error, message
):
  monkeypatch.setitem(sys.modules, 'torch', Torch(error))
  assert_plain_error(_existing(tmp_path / 'x'), message)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_torch_file_cut_anywhere_is_a_plain_error(tmp_path, zipped):
  torch, tensors = torch_state()
  whole = io.BytesIO()
  torch.save(tensors, whole, _use_new_zipfile_serialization=zipped)
  for size in range(0, len(whole.getvalue()), 17):
    (tmp_path / 'x').write_bytes(whole.getvalue()[:size])
    assert_plain_error(tmp_path / 'x', 'x is damaged|of the kind')


def test_an_array_without_a_name_is_no_state(tmp_path):
  with open(tmp_path / 'x.npz', 'wb') as file:
    np.save(file, np.ones(3))
  assert_plain_error(tmp_path / 'x.npz', 'one array, without a name')


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
