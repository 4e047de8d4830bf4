"""The run as a whole: resume, signals, guards, errors."""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import types
from unittest import mock

import jax
import numpy as np
import pytest

import command
import micro
from ds_jax import (
  checkpoint,
  data,
  models,
  parallel,
  routing,
)
from ds_jax import config as config_lib
from ds_jax.train import loop, phases

_PHASES = ('supernet', 'calibrate', 'gate')


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


@pytest.mark.slow
def test_killed_in_every_stage_ends_bit_equal(images, tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  # 20 of 80 images, two batches, the second part full.
  held_out = '--config.dataset.budget_share=0.25'
  code, output = command.Command(images, whole, held_out).finish()
  assert code == 0, output

  # Any step will do, and each run of this test takes others; the seed that one
  # prints repeats them. The last is killed once the images held out are swept,
  # before the evaluation ends.
  seed = int(os.environ.get('DS_JAX_KILL_SEED', random.randrange(10**6)))
  print(f'DS_JAX_KILL_SEED={seed}')
  draw = random.Random(seed)
  steps = [draw.randint(2, high) for high in (15, 20, 15)] + [1]
  for phase, count in zip((*_PHASES, 'held_out'), steps, strict=True):
    process = command.Command(images, broken, held_out)
    process.wait_for(phase, count)
    process.send_signal(signal.SIGKILL)
    code, _ = process.finish()
    assert code == -signal.SIGKILL
    assert command.rows(broken)[-1]['phase'] == phase, (
      f'killed too late: {steps}'
    )
  code, output = command.Command(images, broken, held_out).finish()
  assert code == 0, output
  assert 'Resuming held_out' in output or 'Resuming gate' in output

  expected = checkpoint.restore(checkpoint.directory_of(whole))
  found = checkpoint.restore(checkpoint.directory_of(broken))
  assert found.step == expected.step
  assert found.meta['phase'] == 'held_out'
  assert len(found.tree['outcomes']['right']) == 20
  jax.tree.map(np.testing.assert_array_equal, found.tree, expected.tree)
  results = [(d / 'results.json').read_text() for d in (whole, broken)]
  assert results[0] == results[1]


def test_sigterm_saves_and_exits_cleanly(images, tmp_path):
  process = command.Command(
    images, tmp_path / 'run', JAX_COMPILATION_CACHE_DIR=None
  )
  process.wait_for('supernet', 3)
  process.send_signal(signal.SIGTERM)
  code, output = process.finish()
  assert code == 0, output
  assert 'SIGTERM: saved supernet at step' in output
  restored = checkpoint.restore(checkpoint.directory_of(tmp_path / 'run'))
  assert restored.step == command.rows(tmp_path / 'run')[-1]['step']
  # For the resumed run, which so need not compile again.
  assert list((tmp_path / 'run' / 'compiled').glob('*'))


@pytest.mark.slow
def test_a_run_moves_over_devices_and_executors(
  finished, tmp_path, monkeypatch
):
  """Eight devices, one, and eight replicas, as if on eight throughout.

  But for roundings (6e-8) that 120 steps make larger. The last part is of Stage
  II, where batch norm is frozen, so that replicas do the same.
  """
  config, whole, _ = finished
  config = config.copy_and_resolve_references()
  for num_devices, name, stop in (
    (8, 'pjit', 10),
    (1, 'pjit', 45),
    (8, 'pmap', None),
  ):
    config.parallel.executor = name
    with monkeypatch.context() as patch:
      on_some = functools.partial(
        parallel.Executor, devices=jax.devices()[:num_devices]
      )
      patch.setattr(loop, 'parallel', types.SimpleNamespace(Executor=on_some))
      if stop is None:
        results = loop.train(config, tmp_path)
        continue
      patch.setattr(
        loop.hosts.Termination, 'is_due', lambda self, step, at=stop: step == at
      )
      with pytest.raises(loop.Preempted, match='the same command resumes'):
        loop.train(config, tmp_path)
  found, expected = (
    checkpoint.restore(checkpoint.directory_of(w)) for w in (tmp_path, whole)
  )
  assert found.step == expected.step == 120
  for path, array in expected.tree['network']['params'].items():
    scale = np.abs(array).max() + 1e-3
    np.testing.assert_allclose(
      found.tree['network']['params'][path],
      array,
      rtol=0,
      atol=0.02 * scale,
      err_msg=path,
    )
  assert abs(results['routed']['top1'] - finished[2]['routed']['top1']) <= 0.1


def test_an_object_store_as_workdir_is_refused(config):
  with pytest.raises(config_lib.ConfigError, match='gs://b/run: expected a fo'):
    loop.train(config, 'gs://b/run')


def test_a_finished_run_is_only_evaluated_again(finished):
  config, workdir, results = finished
  rows = len(command.rows(workdir))
  assert loop.train(config, workdir) == results
  assert len(command.rows(workdir)) == rows


def test_evaluate_mode_writes_the_same_results(finished):
  config, workdir, results = finished
  (workdir / 'results.json').unlink()
  assert loop.evaluate_only(config, workdir) == results
  assert json.loads((workdir / 'results.json').read_text()) == results


def test_metrics_have_a_row_for_each_step(finished):
  _, workdir, _ = finished
  for phase, num_steps in zip(_PHASES, (40, 40, 40), strict=True):
    rows = [r for r in command.rows(workdir) if r['phase'] == phase]
    assert sum('images_per_second' in row for row in rows) == num_steps
  names = {
    n for r in command.rows(workdir) if r['phase'] == 'supernet' for n in r
  }
  assert {'loss/widest', 'loss/0', 'loss/1', 'test/top1/narrowest'} <= names
  assert not any(name.startswith('held_out') for name in names)


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
  with pytest.raises(config_lib.ConfigError, match=message):
    loop.train(config, workdir)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    (
      'model.num_classes',
      2,
      'labels 0 to 1, but idx:.* has labels 0 to 2; set',
    ),
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
    ('seed', 2**32, 'seed=4294967296: expected .* at most 4294967295'),
    ('gate.target', 'right', "In config.gate: target='right': expected 'sandw"),
    ('gate.part', 'test', "In config.gate: part='test': expected 'train'"),
    ('gate.part', 'gate', "The gate part of 'idx:.*' is empty: gate_share is"),
    ('gate.target', 'correctness', 'set dataset.budget_share'),
    ('supernet.num_epochs', -1.0, 'num_epochs=-1.0: expected at least 0'),
    ('supernet.num_epochs', 0.0, 'there is none; set init.checkpoint'),
  ],
)
def test_a_wrong_config_is_refused(config, tmp_path, field, value, message):
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  with pytest.raises(config_lib.ConfigError, match=message):
    loop.train(config, tmp_path)


def write_labels(folder, split, labels):
  """Replaces a split of `micro.write_images` by black images."""
  images = np.zeros((len(labels), 8, 8), np.uint8)
  micro.write_idx(folder / f'{split}-images-idx3-ubyte', images)
  labels = np.array(labels, np.uint8)
  micro.write_idx(folder / f'{split}-labels-idx1-ubyte', labels)


@pytest.mark.parametrize(
  ('train', 'test', 'message'),
  [
    ([0, 1] * 20, [0], None),  # of three classes two occur
    ([1, 2, 3] * 20, [1], 'has labels 1 to 3; set it to 4; or are they 1 to 3'),
    ([0, 1, 2] * 20, [3], 'has labels 0 to 3; set it to 4[.]$'),
    ([0, 1, 2] * 20, [], 'The test split of .* has no images'),
    ([], [0], 'The train split of .* has no images'),
  ],
)
def test_labels_that_the_model_has_not(tmp_path, train, test, message):
  name = micro.write_images(tmp_path)
  write_labels(tmp_path, 'train', train)
  write_labels(tmp_path, 't10k', test)
  config = micro.get_config()
  config.dataset.name = name
  parts = config_lib.Experiment.from_config(config)
  if message is None:
    phases.check_dataset(parts, data.dataset_info(parts.dataset))
    return
  with pytest.raises(ValueError, match=message):
    phases.check_dataset(parts, data.dataset_info(parts.dataset))


def test_correctness_needs_to_know_what_to_spend(config, tmp_path):
  config.dataset.budget_share = 0.25
  with config.unlocked():
    config.gate.target = 'correctness'
    config.gate.target_madds = None
  with pytest.raises(
    config_lib.ConfigError, match="target='correctness' needs gate.target_madds"
  ):
    loop.train(config, tmp_path)


def test_a_config_need_not_state_the_model_s_defaults(finished, monkeypatch):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  monkeypatch.setattr(loop.Run, 'evaluate', lambda *args: 'resumed')
  with config.unlocked():
    del config.model.dtype  # it was float32
    config.model.head_pooling = 'mean'
  with pytest.raises(config_lib.ConfigError, match='head_pooling'):
    loop.evaluate_only(config, workdir)
  with config.unlocked():
    del config.model.head_pooling
  assert loop.evaluate_only(config, workdir) == 'resumed'
  config.model.dtype = 'bfloat16'
  message = "model.dtype was 'float32' and is 'bfloat16'"
  with pytest.raises(config_lib.ConfigError, match=message):
    loop.evaluate_only(config, workdir)


def test_where_the_images_are_may_change(finished, tmp_path):
  config, workdir, results = finished
  config = config.copy_and_resolve_references()
  config.dataset.name = micro.write_images(tmp_path)
  config.dataset.num_threads = 0
  assert loop.evaluate_only(config, workdir) == results


def test_other_libraries_than_the_checkpoint_s_are_named(finished, monkeypatch):
  config, workdir, _ = finished
  said = []
  monkeypatch.setattr(
    loop.logging, 'warning', lambda text, *values: said.append(text % values)
  )
  monkeypatch.setattr(loop.Run, 'evaluate', lambda *args: None)
  loop.evaluate_only(config, workdir)
  assert not said
  versions = {**loop.hosts.versions(), 'numpy': '9.9'}
  monkeypatch.setattr(loop.hosts, 'versions', lambda: versions)
  loop.evaluate_only(config, workdir)
  (text,) = said
  assert f'other libraries: numpy was {np.__version__} and is 9.9. ' in text


def test_hosts_compare_how_many_images_they_have(config, tmp_path, monkeypatch):
  config.dataset.budget_share = 0.25
  compared = []
  monkeypatch.setattr(loop.hosts, 'check_same_images', compared.append)
  loop.Run(config, tmp_path).__exit__()
  assert compared == [{'test': 40, 'train': 60, 'budget': 20}]


def test_training_in_a_converted_workdir_is_refused(config, tmp_path):
  directory = checkpoint.directory_of(tmp_path)
  with checkpoint.Checkpointer(directory) as saver:
    saver.save(0, {'network': {'x': np.zeros(1)}}, {'phase': 'converted'})
  with pytest.raises(config_lib.ConfigError, match='holds a converted'):
    loop.train(config, tmp_path)


def test_a_flag_for_no_field_is_a_plain_error(images, tmp_path):
  code, output = command.Command(
    images, tmp_path, '--config.supernet.ema_rate=1'
  ).finish()
  assert code == 1
  assert 'Unknown field --config.supernet.ema_rate; config.supernet' in output
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


@pytest.fixture(scope='module')
def budgeted(images, tmp_path_factory):
  """A run with images held out for the gate and budgets, each step saved.

  Its config, workdir and results, and for each step its phase and how often the
  data were opened in it.
  """
  config = micro.get_config()
  config.dataset.name = images
  # Of 80 images 16 and 20: one batch, and one and a quarter.
  config.dataset.gate_share = 0.2
  config.dataset.budget_share = 0.25
  config.supernet.num_epochs = 1.0
  config.calibrate.num_batches = 2
  config.gate.num_epochs = 2.0
  with config.unlocked():
    config.gate.part = 'gate'
    config.gate.target = 'correctness'
  config.checkpoint = dict(every_steps=1, keep_last=100, keep_best=0)
  workdir = tmp_path_factory.mktemp('budgeted')
  opened, at_steps = [], []
  load_source = data.sources.load_source
  after_step = loop.Run._after_step

  def counted_load(*args, **options):
    opened.append(args)
    return load_source(*args, **options)

  def counted_step(run, done, state, progress):
    before = len(opened)
    after_step(run, done, state, progress)
    # What is evaluated is opened once for each evaluation.
    at_steps.append((done.phase, len(opened) - before))

  with (
    mock.patch.object(data.sources, 'load_source', counted_load),
    mock.patch.object(loop.Run, '_after_step', counted_step),
  ):
    return config, workdir, loop.train(config, workdir), at_steps


def test_a_step_opens_no_data(budgeted):
  """Of a large set that takes seconds: a permutation of all its images."""
  # Two steps each; the end of Stage I is evaluated.
  assert budgeted[3] == [(0, 0), (0, 1), *[(s, 0) for s in (1, 1, 2, 2)]]


def test_every_image_held_out_is_swept_at_the_end(budgeted):
  config, workdir, results, _ = budgeted
  restored = checkpoint.restore(checkpoint.directory_of(workdir))
  # Three phases of two steps.
  assert (restored.step, restored.meta['phase']) == (7, 'held_out')
  # A gate in the middle of its training is none.
  trained = [
    checkpoint.restore(checkpoint.directory_of(workdir), step).meta['has_gate']
    for step in range(1, 8)
  ]
  assert trained == [False] * 5 + [True] * 2
  assert restored.tree.keys() == {'network', 'outcomes'}
  right = routing.images_held_out(restored.tree).right
  assert len(right) == 20
  assert results['budgets_set_on'] == 'held-out images'
  (row,) = [r for r in command.rows(workdir) if r['phase'] == 'held_out']
  assert row['right/narrowest'] == pytest.approx(right[:, 0].mean(), rel=1e-6)
  assert row['right/last'] == pytest.approx(right[:, -1].mean(), rel=1e-6)


def test_stage_one_is_evaluated_on_images_held_out(budgeted):
  config, workdir, *_ = budgeted
  (row,) = [r for r in command.rows(workdir) if 'held_out/top1' in r]
  assert (row['step'], row['phase']) == (2, 'supernet')
  assert not any(name.startswith('test/') for name in row)
  model = models.create_model(**config.model)
  restored = checkpoint.restore(checkpoint.directory_of(workdir), 2)
  network = models.variables_from(restored.tree['network'])
  model = models.Architecture(model).bind(network)
  parsed = config_lib.Experiment.from_config(config)
  normalize = data.normalizer(parsed.dataset)
  source = data.load_part(parsed.dataset, 'budget')
  examples = [source[i] for i in range(len(source))]
  images = np.stack([e['image'] for e in examples])
  labels = np.array([e['label'] for e in examples])
  for name in ('narrowest', 'widest'):
    logits = model(normalize(images), getattr(model, name))
    top1 = float((logits.argmax(-1) == labels).mean())
    assert row[f'held_out/top1/{name}'] == pytest.approx(top1, abs=1e-6)


@pytest.mark.parametrize(
  ('gate_share', 'budget_share', 'part', 'chosen_by'),
  [
    (0.0, 0.0, 'train', None),
    (0.2, 0.25, 'gate', 'budget'),
    (0.2, 0.0, 'train', 'gate'),
    (0.2, 0.0, 'gate', None),  # Stage II trains on it
  ],
)
def test_checkpoints_are_chosen_by_images_that_no_stage_trains_on(
  config, tmp_path, gate_share, budget_share, part, chosen_by
):
  config.dataset.gate_share, config.dataset.budget_share = (
    gate_share,
    budget_share,
  )
  with config.unlocked():
    config.gate.part = part
  assert config_lib.Experiment.from_config(config).choice_part == chosen_by
  with loop.Run(config, tmp_path) as run:
    expected = f'the {chosen_by} part' if chosen_by else 'none are held out'
    assert expected in run.choice()


def test_test_images_choose_no_checkpoint(config, tmp_path, monkeypatch):
  """20 images held out are best at the first evaluation, 40 to test later."""
  config.dataset.budget_share = 0.25
  config.supernet.num_epochs = 3.0
  config.eval_every_epochs = 1.0
  config.checkpoint = dict(every_steps=1000, keep_last=1, keep_best=1)
  scores = {20: [0.9, 0.5, 0.4], 40: [0.5, 0.9, 0.4]}

  def ends(self, variables, batches):
    num_images = sum(batch['mask'].sum() for batch in batches)
    return {'top1': scores[num_images].pop(0)}

  monkeypatch.setattr(loop.evaluation.Evaluator, 'ends', ends)
  with loop.Run(config, tmp_path) as run:
    run.train_phase(*run.start())
  kept = {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()}
  # Of three steps an epoch: the best, and the last.
  assert kept == {3, 9}
  assert [len(left) for left in scores.values()] == [0, 3]


def test_the_log_says_once_that_nothing_may_choose(finished, monkeypatch):
  config, workdir, _ = finished
  said = []
  monkeypatch.setattr(
    loop.logging, 'info', lambda text, *values: said.append(text % values)
  )
  monkeypatch.setattr(loop.Run, 'evaluate', lambda *args: None)
  loop.train(config, workdir)
  assert sum('checkpoint.keep_best=1 chooses by' in text for text in said) == 1
  # All of Stage II.
  steps = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert len(steps) == 2 and steps[0] > 80


def test_a_run_resumes_before_its_sweep_bit_equal(budgeted, tmp_path):
  config, workdir, results, _ = budgeted
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  directory = pathlib.Path(checkpoint.directory_of(tmp_path))
  shutil.rmtree(directory / '7')
  (tmp_path / 'results.json').unlink()
  assert loop.train(config, tmp_path) == results
  one, other = (
    checkpoint.restore(checkpoint.directory_of(d)) for d in (workdir, tmp_path)
  )
  assert one.step == other.step == 7
  jax.tree.map(np.testing.assert_array_equal, one.tree, other.tree)
  texts = [(d / 'results.json').read_text() for d in (workdir, tmp_path)]
  assert texts[0] == texts[1]


def test_a_run_with_budgets_is_evaluated_from_its_checkpoint(budgeted):
  config, workdir, results, _ = budgeted
  assert loop.evaluate_only(config, workdir) == results
  assert json.loads((workdir / 'results.json').read_text()) == results


@pytest.mark.parametrize('part', ['train', 'gate'])
def test_gate_reads_the_part_that_it_is_told(budgeted, tmp_path, part):
  config, *_ = budgeted
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.gate.part = part
    config.gate.is_augmented = False
  dataset = config_lib.Experiment.from_config(config).dataset
  with loop.Run(config, tmp_path) as run:
    batches = run._train_batches(loop.Position(2))
    found = {i.tobytes() for _ in range(4) for i in next(batches)['images']}
    batches.close()
  source = data.load_part(dataset, part)
  expected = {source[i]['image'].tobytes() for i in range(len(source))}
  assert found == expected


def test_each_stage_s_order_is_that_of_runs_without_budgets(config, tmp_path):
  config.seed = 2
  dataset = config_lib.Experiment.from_config(config).dataset
  with loop.Run(config, tmp_path) as run:
    for phase in range(3):
      batches = run._train_batches(loop.Position(phase, 4))
      expected = data.train_batches(dataset, seed=2 * 3 + phase, start_step=4)
      one, other = next(batches), next(expected)
      batches.close()
      expected.close()
      np.testing.assert_array_equal(one['images'], other['images'])
      np.testing.assert_array_equal(one['labels'], other['labels'])


def test_calibration_repeats_no_image(config, tmp_path):
  config.dataset.update(
    batch_size=16, num_repeats=4, crop=None, flip=False, gate_share=0.2
  )
  counts = []
  with loop.Run(config, tmp_path) as run:
    for phase in range(3):
      batches = run._train_batches(loop.Position(phase))
      counts.append(len({i.tobytes() for i in next(batches)['images']}))
      batches.close()
  assert counts == [4, 16, 4]


def test_without_supernet_training_only_the_gate_changes(
  finished, config, tmp_path
):
  _, trained, _ = finished
  config.supernet.num_epochs = 0.0
  config.calibrate.num_batches = 2
  config.gate.num_epochs = 1.0
  config.init = dict(checkpoint=str(trained))
  loop.train(config, tmp_path)
  before, after = (
    checkpoint.restore(checkpoint.directory_of(d)) for d in (trained, tmp_path)
  )
  # Two of calibration and five of the gate.
  assert after.step == 2 + 5 and after.meta['phase'] == 'gate'
  assert {row['phase'] for row in command.rows(tmp_path)} == {
    'calibrate',
    'gate',
  }
  params = [r.tree['network']['params'] for r in (before, after)]
  changed = {
    path
    for path, array in params[0].items()
    if array.tobytes() != params[1][path].tobytes()
  }
  assert changed == {path for path in params[0] if models.is_slimming(path)}
  assert changed


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
      {'phase': 'gate', 'model': {'name': 'ds_mobilenet_tiny'}},
    )
  (tmp_path / 'empty').mkdir()
  config.init = dict(checkpoint=str(tmp_path / checkpoint_name))
  with (
    pytest.raises(config_lib.ConfigError, match=message),
    loop.Run(config, tmp_path / 'run') as run,
  ):
    run.start()


def test_slices_that_are_trained_are_not_sorted(finished, config, tmp_path):
  _, trained, _ = finished
  config.init = dict(checkpoint=str(trained), sort_channels='l1')
  with (
    loop.Run(config, tmp_path) as run,
    pytest.raises(config_lib.ConfigError, match='slices are trained as they'),
  ):
    run.start()


def test_another_start_is_not_resumed(finished, images):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.init = dict(checkpoint='elsewhere')
  with pytest.raises(config_lib.ConfigError, match='init.checkpoint was None'):
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
  config.calibrate.num_batches = 4
  config.gate.num_epochs = 2.0
  config.gate.target_madds = None
  config.checkpoint = dict(every_steps=3, keep_last=100, keep_best=0)
  return config


@pytest.mark.slow
def test_a_vit_resumes_bit_equal(images, tmp_path):
  """Two views, stochastic depth, and no statistics but the gate's."""
  config = _vit_config(images)
  results = [loop.train(config, tmp_path)]
  directory = pathlib.Path(checkpoint.directory_of(tmp_path))
  last = checkpoint.restore(str(directory))
  assert last.step == 10 + 4 + 10
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
      config_lib.ConfigError, match="slicing='idle', and .*'plain'"
    ),
  ):
    run.start()
