"""The benchmark runs on a tiny network, and its rows add up."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import serialization

import ds_jax
import micro
from ds_jax import benchmark, checkpoint, models, predict, routing


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A finished run's checkpoint, with its data set, without the run."""
  folder = tmp_path_factory.mktemp('run')
  rng = np.random.default_rng(0)
  state = {
    'network': models.variables_of(ds_jax.create_model(**micro.MODEL)),
    'outcomes': routing.observe(
      rng.normal(size=(200, 3)).astype(np.float32),
      rng.normal(size=(200, 3, 3)).astype(np.float32),
      rng.integers(0, 3, 200),
    ),
    'mask': np.ones(200, bool),
  }
  dataset = dict(name=micro.write_images(folder), image_size=8, num_threads=0)
  meta = {
    'stage': 'budget', 'model': micro.MODEL, 'image_size': 8,
    'crop_ratio': 1.0, 'mean': (0.5,) * 3, 'std': (0.5,) * 3,
    'gate': {'target': 'sandwich', 'target_madds': 4e3},
    'config': {'dataset': dataset},
  }  # fmt: skip
  with checkpoint.Checkpointer(checkpoint.directory_of(folder)) as saver:
    saver.save(1, serialization.to_state_dict(state), meta)
  return folder


def test_ways_are_timed_in_turn():
  calls = []
  ways = [lambda name=name: calls.append(name) for name in 'ab']
  seconds = benchmark.time_in_turn(ways, repeats=3)
  # Once each before the first is timed.
  assert ''.join(calls) == 'ab' * 4
  assert [len(taken) for taken in seconds] == [3, 3]
  assert min(map(min, seconds)) >= 0


def test_rows_of_the_command_add_up(workdir, capsys):
  path = workdir / 'rows.json'
  benchmark.main(
    [
      f'--workdir={workdir}',
      '--batch_sizes=1,8',
      '--num_images=16',
      '--repeats=2',
      f'--json={path}',
    ]
  )
  written = json.loads(path.read_text())
  assert written['device'] == jax.devices()[0].device_kind
  rows = [benchmark.Row(**row) for row in written['rows']]
  assert [row.batch_size for row in rows] == [1] * 5 + [8] * 5
  # Of the budgets, 40% and 60% of the dearest are below the narrowest's cost.
  names = [f'bucket {k}' for k in range(3)] + ['gate at 80%', 'cascade at 80%']
  assert [row.name for row in rows] == names * 2
  predictor = predict.Predictor.restore(workdir)
  model = predictor.model
  madds = [model.cost(s, 8).madds for s in model.routing_space]
  for first in (0, 5):
    assert [row.madds for row in rows[first : first + 3]] == madds
    dearest = rows[first + 2]
    assert (dearest.speed_up, dearest.realised) == (1, 1)
    for row in rows[first : first + 5]:
      speed_up = dearest.milliseconds / row.milliseconds
      np.testing.assert_allclose(row.speed_up, speed_up, rtol=1e-12)
      reduction = madds[-1] / row.madds
      np.testing.assert_allclose(row.madds_reduction, reduction, rtol=1e-12)
      np.testing.assert_allclose(row.realised, speed_up / reduction, rtol=1e-12)
  printed = capsys.readouterr().out
  assert all(name in printed for name in names)


def test_the_table_has_a_line_for_each_row():
  row = benchmark.Row('bucket 0', 8, 0.125, 0.05, 1234567.0, 2.5, 5.0, 0.5)
  header, line, other = benchmark.table(
    [row, dataclasses.replace(row, name='gate at 40%')]
  ).splitlines()
  assert header.split() == [
    'batch', 'ms/image', 'spread', 'MAdds', 'speed-up', 'reduction', 'realised',
  ]  # fmt: skip
  assert line.split() == [
    'bucket', '0', '8', '0.125', '5.0%', '1,234,567', '2.50', '5.00', '0.50',
  ]  # fmt: skip
  assert other.startswith('     gate at 40%')
