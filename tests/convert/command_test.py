"""Tests of `python -m ds_jax.convert`, from file to prediction."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import ds_jax
import plain
from ds_jax import checkpoint, models
from ds_jax.convert import command, official

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalized(mean, std):
  return ((IMAGES / 255 - mean) / std).astype(np.float32)


def convert(folder, state, *options):
  """Runs the command on an .npz file; returns the predictor."""
  np.savez(folder / 'weights.npz', **state)
  output = folder / 'run'
  command.main(
    [f'--input={folder / "weights.npz"}', f'--output={output}', *options]
  )
  # Preparing the slices of 14 buckets takes long.
  return ds_jax.Predictor.restore(output, presliced=False)


def widest_logits(predictor):
  return predictor(IMAGES, subnet=len(predictor.model.routing_space) - 1).logits


def assert_close(found, expected):
  # Float32 through tens of layers.
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def cifar_resnet_state():
  stages = ((64, 16, 1), (128, 32, 3), (256, 64, 2), (512, 128, 2))
  return plain.resnet_state(7, (32, 3), stages)


def cifar_vit_state():
  return plain.vit_state(7, 96, 192, 7, 4, side=8, class_token=False)


def release_state():
  """A state with the release's names, and random weights."""
  model = models.create_abstract_model('ds_mobilenet', 7)
  variables = models.variables_of(model)
  rng = np.random.default_rng(0)
  state = {}
  for path, array in {**variables.params, **variables.batch_stats}.items():
    source = official.source_of(model, path, array.shape)
    for name, shape in zip(source.names, source.shapes, strict=True):
      state[name] = np.abs(0.1 * rng.normal(size=shape)).astype(np.float32)
  return state


def test_a_sorted_resnet_predicts_what_the_source_does(tmp_path):
  state = cifar_resnet_state()
  options = ('--model=ds_resnet26_cifar', '--sort=norm_scale')
  predictor = convert(tmp_path, state, *options)
  expected = plain.resnet_logits(
    state, normalized(*IMAGENET), stem_stride=1, pool=False
  )
  assert_close(widest_logits(predictor), np.asarray(expected))
  with pytest.raises(ValueError, match='its gate is not trained'):
    predictor(IMAGES)


def test_a_vit_file_of_safetensors_with_channel_statistics(tmp_path):
  state = cifar_vit_state()
  safetensors.numpy.save_file(state, tmp_path / 'weights.safetensors')
  command.main(
    [
      f'--input={tmp_path / "weights.safetensors"}',
      f'--output={tmp_path / "run"}',
      '--model=ds_vit_cifar',
      '--mean=0.5',
      '--std=0.5,0.4,0.3',
    ]
  )
  predictor = ds_jax.Predictor.restore(tmp_path / 'run')
  images = normalized((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
  expected = plain.vit_logits(state, images, head_dim=32)
  assert_close(widest_logits(predictor), np.asarray(expected))
  with pytest.raises(ValueError, match='its gate is not trained'):
    predictor(IMAGES)


def test_a_vit_of_another_size_and_other_classes(tmp_path):
  options = ('--model=ds_vit_cifar', '--image_size=16', '--num_classes=3')
  predictor = convert(tmp_path, cifar_vit_state(), *options)
  assert predictor.image_size == predictor.model.image_size == 16
  assert predictor(IMAGES, subnet=1).logits.shape == (2, 3)


@pytest.mark.parametrize('gate', ['trained', 'untrained'])
def test_a_gate_is_trained_where_it_is_said_to_be(tmp_path, gate):
  state = release_state()
  # Untrained unless it is said to be, as in the authors' release.
  options = [f'--gate={gate}'] * (gate == 'trained')
  predictor = convert(tmp_path, state, '--model=ds_mobilenet', *options)
  if gate == 'untrained':
    with pytest.raises(ValueError, match='not trained.*--gate=trained'):
      predictor(IMAGES)
  np.testing.assert_array_equal(
    predictor.model.classifier.kernel[...], state['classifier.weight'].T
  )
  restored = checkpoint.restore(checkpoint.directory_of(tmp_path / 'run'))
  assert restored.meta['phase'] == 'converted'


def test_a_network_without_a_gate_has_none_that_is_trained(tmp_path):
  options = ('--model=ds_vit_cifar', '--gate=trained')
  with pytest.raises(SystemExit, match="timm's ViT, which has no gate"):
    convert(tmp_path, cifar_vit_state(), *options)


@pytest.mark.parametrize(
  'option, message',
  [
    ('--sort=l1', 'slices are trained as they are; leave out --sort'),
    ('--model=nothing', 'invalid choice'),
    ('--mean=1,2', "'1,2': expected one number or three"),
    ('--std=x', "'x': expected one number or three"),
  ],
)
def test_what_does_not_fit_ends_in_one_message(
  tmp_path, capsys, option, message
):
  with pytest.raises(SystemExit) as stopped:
    convert(tmp_path, release_state(), '--model=ds_mobilenet', option)
  assert message in f'{stopped.value}{capsys.readouterr().err}'
  assert not (tmp_path / 'run').exists()


def test_a_file_that_is_not_there_ends_in_one_message(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'ds_jax.convert'),
      *(f'--input={tmp_path / "x.npz"}', f'--output={tmp_path / "run"}'),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith('FileNotFoundError')
  assert 'Traceback' not in done.stderr


def test_a_workdir_in_use_is_left_alone(tmp_path):
  (tmp_path / 'run/checkpoints/7').mkdir(parents=True)
  with pytest.raises(SystemExit, match='choose a new --output'):
    convert(tmp_path, release_state(), '--model=ds_mobilenet')
