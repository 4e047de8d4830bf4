"""The run as a whole: resume, signals, guards, errors."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import micro
from ds_jax import checkpoint
from ds_jax.train import experiment, loop

_REPOSITORY = pathlib.Path(__file__).parents[2]
_STAGES = ('supernet', 'calibrate', 'gate')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return micro.write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def config(images):
  config = micro.get_config()
  config.dataset.name = images
  return config


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
  """A whole run in this process: (config, workdir, results)."""
  config = micro.get_config()
  config.dataset.name = images
  workdir = tmp_path_factory.mktemp('finished')
  return config, workdir, loop.train(config, workdir)


def _rows(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:  # cut off by a kill, or not yet whole
      continue
  return rows


class _Command:
  """`python -m ds_jax.main` in a process of its own."""

  def __init__(self, images, workdir, cache, *arguments):
    environment = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.workdir = workdir
    self.process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'ds_jax.main'),
        *('--config=tests/micro.py', f'--workdir={workdir}'),
        f'--config.dataset.name={images}',
        *arguments,
      ],
      cwd=_REPOSITORY,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def wait_for(self, stage, count, timeout=500):
    """Returns once this process wrote `count` rows of a stage."""
    before = len(_rows(self.workdir))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
      rows = _rows(self.workdir)[before:]
      if sum(row['stage'] == stage for row in rows) >= count:
        return
      assert self.process.poll() is None, self.process.communicate()[0]
      time.sleep(0.001)
    raise AssertionError(f'No {count} steps of {stage} in {timeout} s.')

  def finish(self):
    output, _ = self.process.communicate(timeout=500)
    return self.process.returncode, output


def test_killed_in_every_stage_ends_bit_equal(images, tmp_path):
  cache = tmp_path / 'cache'
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  code, output = _Command(images, whole, cache).finish()
  assert code == 0, output

  # Any step will do, and each run of this test takes others.
  steps = [random.randint(2, high) for high in (25, 20, 20)]
  for stage, count in zip(_STAGES, steps, strict=True):
    command = _Command(images, broken, cache)
    command.wait_for(stage, count)
    command.process.send_signal(signal.SIGKILL)
    code, _ = command.finish()
    assert code == -signal.SIGKILL
    assert _rows(broken)[-1]['stage'] == stage, f'killed too late: {steps}'
  code, output = _Command(images, broken, cache).finish()
  assert code == 0, output
  assert 'Resuming gate' in output or 'Resuming calibrate' in output

  expected = checkpoint.restore(checkpoint.directory_of(whole))
  found = checkpoint.restore(checkpoint.directory_of(broken))
  assert found.step == expected.step
  jax.tree.map(np.testing.assert_array_equal, found.tree, expected.tree)
  results = [(d / 'results.json').read_text() for d in (whole, broken)]
  assert results[0] == results[1]


def test_sigterm_saves_and_exits_cleanly(images, tmp_path):
  command = _Command(images, tmp_path / 'run', tmp_path / 'cache')
  command.wait_for('supernet', 3)
  command.process.send_signal(signal.SIGTERM)
  code, output = command.finish()
  assert code == 0, output
  assert 'SIGTERM: saved supernet at step' in output
  restored = checkpoint.restore(checkpoint.directory_of(tmp_path / 'run'))
  assert restored.step == _rows(tmp_path / 'run')[-1]['step']


def test_a_finished_run_is_only_evaluated_again(finished):
  config, workdir, results = finished
  rows = len(_rows(workdir))
  assert loop.train(config, workdir) == results
  assert len(_rows(workdir)) == rows


def test_evaluate_mode_writes_the_same_results(finished):
  config, workdir, results = finished
  (workdir / 'results.json').unlink()
  assert loop.evaluate_only(config, workdir) == results
  assert json.loads((workdir / 'results.json').read_text()) == results


def test_metrics_have_a_row_for_each_step(finished):
  _, workdir, _ = finished
  for stage, num_steps in zip(_STAGES, (40, 40, 40), strict=True):
    rows = [r for r in _rows(workdir) if r['stage'] == stage]
    assert sum('images_per_second' in row for row in rows) == num_steps
  names = {n for r in _rows(workdir) if r['stage'] == 'supernet' for n in r}
  assert {'loss/widest', 'loss/0', 'loss/1', 'top1/narrowest'} <= names


def test_diverging_stops_and_keeps_a_finite_checkpoint(config, tmp_path):
  config.supernet.optimizer.learning_rate = 1e30
  config.supernet.optimizer.clip_norm = None
  config.checkpoint.every_steps = 1
  config.log_every_steps = 100
  with pytest.raises(loop.NonFiniteError, match='supernet diverged by step'):
    loop.train(config, tmp_path)
  directory = pathlib.Path(checkpoint.directory_of(tmp_path))
  if any(directory.iterdir()):
    tree = checkpoint.restore(str(directory)).tree
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('seed', 1, 'seed was 0 and is 1'),
    ('dataset.batch_size', 8, 'dataset.batch_size was 16 and is 8'),
    ('gate.target_madds', 3.9e3, 'gate.target_madds was 4000.0 and is 3900'),
  ],
)
def test_another_config_is_refused(finished, field, value, message):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(experiment.ConfigError, match=message):
    loop.train(config, workdir)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('model.num_classes', 7, 'num_classes=7, but idx:.* has 3 classes'),
    ('model.name', 'ds_mobilnet', "Unknown model 'ds_mobilnet'"),
    ('dataset.batch_size', 12, '12 does not divide over 8 devices'),
    ('dataset.batch_size', 160, 'batch_size=160 is larger than the train part'),
    ('supernet.num_random', 3, 'only 2 sub-networks between'),
    ('supernet.accumulation_steps', 3, 'does not split'),
    ('supernet.optimizer.name', 'sdg', "In config.supernet.optimizer: .*'sdg'"),
    ('gate.target_madds', 5e9, 'gate.target_madds=5e\\+09 is out of reach'),
    ('gate.hard_images', 'skip', "In config.gate: hard_images='skip'"),
    ('gate.temperature', 0.0, 'temperature=0.0: expected more than 0'),
    ('checkpoint.every_steps', 0, 'every_steps=0: expected at least 1'),
    ('model.dtype', 'bf16', "dtype='bf16': expected 'float32' or"),
    ('seed', -1, 'seed=-1: expected at least 0'),
  ],
)
def test_a_wrong_config_is_refused(config, tmp_path, field, value, message):
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  with pytest.raises(experiment.ConfigError, match=message):
    loop.train(config, tmp_path)


def test_where_the_images_are_may_change(finished, tmp_path):
  config, workdir, results = finished
  config = config.copy_and_resolve_references()
  config.dataset.name = micro.write_images(tmp_path)
  config.dataset.num_threads = 0
  assert loop.evaluate_only(config, workdir) == results


def test_training_in_a_converted_workdir_is_refused(config, tmp_path):
  directory = checkpoint.directory_of(tmp_path)
  with checkpoint.Checkpointer(directory) as saver:
    saver.save(0, {'network': {'x': np.zeros(1)}}, {'stage': 'converted'})
  with pytest.raises(experiment.ConfigError, match='holds a converted'):
    loop.train(config, tmp_path)


def test_a_flag_for_no_field_is_a_plain_error(images, tmp_path):
  code, output = _Command(
    images, tmp_path, tmp_path, '--config.supernet.ema_rate=1'
  ).finish()
  assert code == 1
  assert '--config.FIELD=VALUE: ' in output
  assert 'Traceback' not in output


def test_an_unknown_field_is_named(config, tmp_path):
  with config.unlocked():
    config.supernet.ema_rate = 0.9
  with pytest.raises(
    ValueError, match='Unknown field config.supernet.ema_rate'
  ):
    loop.train(config, tmp_path)


def test_evaluating_nothing_is_refused_and_makes_nothing(config, tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match='No checkpoints in'):
    loop.evaluate_only(config, tmp_path / 'nothing')
  assert not (tmp_path / 'nothing').exists()


def test_a_run_starts_from_another_s_network(finished, config, tmp_path):
  """Finetuning: one field; another number of classes gets a fresh head."""
  _, pretrained, _ = finished
  config.init = dict(checkpoint=str(pretrained))
  with loop.Run(config, tmp_path / 'same') as run:
    _, state = run.start()
  source = checkpoint.restore(checkpoint.directory_of(pretrained)).tree
  for path, array in source['network']['params'].items():
    np.testing.assert_array_equal(state.variables.params[path], array, path)
  for path, array in source['network']['batch_stats'].items():
    np.testing.assert_array_equal(state.variables.batch_stats[path], array)

  config.model.num_classes = 10
  config.dataset.name = 'digits'
  with loop.Run(config, tmp_path / 'other') as run:
    _, state = run.start()
  params = source['network']['params']
  assert state.variables.params['classifier/kernel'].shape == (12, 10)
  for path, array in params.items():
    if not path.startswith('classifier'):
      np.testing.assert_array_equal(state.variables.params[path], array, path)


@pytest.mark.parametrize(
  ('checkpoint_name', 'message'),
  [
    ('nothing', 'nothing: There is no .*nothing; expected a file of weights'),
    ('empty', 'empty is a folder without checkpoints/; expected'),
    ('other', 'other: it holds a ds_mobilenet_tiny, and config.model.name is'),
  ],
)
def test_a_start_that_does_not_fit_is_refused(
  config, tmp_path, checkpoint_name, message
):
  other = tmp_path / 'other'
  with checkpoint.Checkpointer(checkpoint.directory_of(other)) as saver:
    saver.save(
      0,
      {'network': {'params': {'x': np.zeros(2)}}},
      {'stage': 'gate', 'model': {'name': 'ds_mobilenet_tiny'}},
    )
  (tmp_path / 'empty').mkdir()
  config.init = dict(checkpoint=str(tmp_path / checkpoint_name))
  with (
    loop.Run(config, tmp_path / 'run') as run,
    pytest.raises(experiment.ConfigError, match=message),
  ):
    run.start()


def test_slices_that_are_trained_are_not_sorted(finished, config, tmp_path):
  _, trained, _ = finished
  config.init = dict(checkpoint=str(trained), sort_channels='l1')
  with (
    loop.Run(config, tmp_path) as run,
    pytest.raises(experiment.ConfigError, match='slices are trained as they'),
  ):
    run.start()


def test_another_start_is_not_resumed(finished, images):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.init = dict(checkpoint='elsewhere')
  with pytest.raises(experiment.ConfigError, match='init.checkpoint was None'):
    loop.train(config, workdir)


def _vit_config(images):
  config = micro.get_config()
  config.dataset.name = images
  config.model = dict(
    name='ds_vit_cifar',
    num_classes=3,
    image_size=8,
    patch_size=4,
    head_dim=4,
    drop_path_rate=0.2,
    stages=(
      dict(widths=(8,), heads=(2,), hidden=(8,), depths=(1,)),
      dict(widths=(4, 4, 8), heads=(1, 1, 2), hidden=(4, 8, 8), depths=(1,)),
    ),
  )
  config.supernet.multi_view = True
  config.supernet.num_epochs = 2.0
  config.gate.num_epochs = 2.0
  config.gate.target_madds = None
  config.checkpoint = dict(every_steps=3, keep_last=100, keep_best=0)
  return config


def test_a_vit_resumes_bit_equal(images, tmp_path):
  """Two views, stochastic depth, and no statistics to calibrate."""
  config = _vit_config(images)
  results = [loop.train(config, tmp_path)]
  directory = pathlib.Path(checkpoint.directory_of(tmp_path))
  last = checkpoint.restore(str(directory))
  assert last.step == 20
  for step in directory.iterdir():
    if int(step.name) > 3:
      shutil.rmtree(step)
  results.append(loop.train(config, tmp_path))
  again = checkpoint.restore(str(directory))
  assert results[0] == results[1] and again.step == last.step
  for one, other in zip(
    *map(jax.tree.leaves, (last.tree, again.tree)), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  (tmp_path / 'plain').mkdir()
  config.init = dict(checkpoint=str(tmp_path))
  config.model.slicing = 'plain'
  with (
    loop.Run(config, tmp_path / 'plain') as run,
    pytest.raises(
      experiment.ConfigError, match="slicing='idle', and .*'plain'"
    ),
  ):
    run.start()
