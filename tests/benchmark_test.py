"""The benchmark runs on a tiny network, and its numbers add up."""

import builtins
import dataclasses
import json
import statistics

import jax
import numpy as np
import pytest

import ds_jax
import micro
from ds_jax import models
from ds_jax.benchmark import (
  command,
  forward,
  onnxruntime,
  output,
  timing,
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A finished run's checkpoint, with its data set, without the run."""
  folder = tmp_path_factory.mktemp('run')
  dataset = dict(
    name=micro.write_images(folder), image_size=8, batch_size=16, num_threads=0
  )
  micro.save_finished_run(folder, config={'dataset': dataset})
  return folder


def way(name, call=lambda: (), madds=0, batch_size=1, reference=None):
  return timing.Way('some', name, batch_size, madds, call, reference)


def row(name, seconds, madds=0, batch_size=1, reference=None, num_batches=1):
  return timing.Row(
    'some', name, batch_size, madds, reference, num_batches, 1.5, seconds
  )


def test_ways_are_timed_in_turn(monkeypatch):
  monkeypatch.setattr(timing, '_TURN', 0)
  calls = []
  ways = [way(name, lambda name=name: calls.append(name)) for name in 'ab']
  rows = timing.time_in_turn(ways, seconds=0)
  # The first calls are left out.
  assert ''.join(calls) == 'ab' * 4
  assert [len(row.seconds) for row in rows] == [3, 3]
  assert min(min(row.seconds) for row in rows) >= 0


def test_what_a_row_says():
  one = row('a', [4.0, 1.0, 2.0, 3.0, 0.5], 6e6, batch_size=8, num_batches=2)
  assert one.median == 2
  assert one.per_image == 2 / 16
  assert one.spread == (3 - 1) / 2 / 2
  assert one.madds_per_second == 6e6 * 16 / 2


def test_ratios_are_of_the_same_batch_size():
  rows = [
    row('a', [4.0]), row('a', [9.0], batch_size=8), row('a', [1.0], 0, 64),
    row('b', [2.0]), row('b', [3.0], batch_size=8),
  ]  # fmt: skip
  assert timing.ratio(rows, 'a', 'b') == {1: 2.0, 8: 3.0}


def test_the_table_has_a_line_for_each_row():
  rows = [
    row('narrow', [0.25], 1e6, 4, reference='wide'),
    row('wide', [1.0], 5e6, 4),
  ]
  header, narrow, wide = output.table(rows, matmul_rate=1e8).splitlines()
  assert header.split()[:6] == [
    'some', 'batch', 'ms/image', 'spread', 'images/s', 'MAdds',
  ]  # fmt: skip
  # 16 million a second; 4 times faster for 5 times fewer.
  assert narrow.split() == [
    'narrow', '4', '62.500', '0.0%', '16.0', '1,000,000', '0.16', '4.00',
    '5.00', '0.80', '1.50',
  ]  # fmt: skip
  assert wide.split() == [
    'wide', '4', '250.000', '0.0%', '4.0', '5,000,000', '0.20', '1.50',
  ]  # fmt: skip


BARS = {
  'sliced_over_standalone', 'switch_over_static', 'matmul_share',
  'tiled_over_oracle', 'vmapped_over_tiled', 'realised',
  'routed_over_widest_memory', 'native_over_shifted_depthwise',
  'gradient_over_forward', 'warm_over_cold_start', 'pipeline_over_pillow',
}  # fmt: skip


@pytest.mark.slow
def test_a_run_is_measured_whole(workdir, capsys):
  path = workdir / 'benchmark.json'
  command.run(
    command.Options(
      workdir=str(workdir), batch_sizes=(1, 8), train_batch_size=4,
      seconds=0, num_images=16, json=str(path),
    )
  )  # fmt: skip
  written = json.loads(path.read_text())
  assert written['device'].endswith(jax.devices()[0].device_kind)
  assert written['ratios'].keys() == BARS
  rows = [
    timing.Row(
      **{k: v for k, v in row.items() if k not in ('median', 'spread')}
    )
    for row in written['rows']
  ]
  median = {(r.section, r.name, r.batch_size): r.median for r in rows}
  ratios = written['ratios']

  slicing = [
    median['sub-networks', f'bucket {k}, sliced', n]
    / median['sub-networks', f'bucket {k}, own weights', n]
    for k in range(3)
    for n in (1, 8)
  ]
  assert ratios['sliced_over_standalone'] == statistics.median(slicing)
  switch = [
    median['sub-networks', f'bucket {k}, switch', 1]
    / median['sub-networks', f'bucket {k}, own weights', 1]
    for k in range(3)
  ]
  assert ratios['switch_over_static'] == statistics.median(switch)
  model = ds_jax.create_model(**micro.MODEL)
  rate = 2048**3 / median['matmul', '2048', 1]
  madds = 8 * model.cost(model.routing_space[2], 8).madds
  seconds = median['sub-networks', 'bucket 2, own weights', 8]
  np.testing.assert_allclose(
    ratios['matmul_share']['2/8'], madds / seconds / rate, rtol=1e-12
  )
  tiled = median['dispatch', 'tiled', 8]
  assert (
    ratios['tiled_over_oracle']
    == tiled / median['dispatch', 'oracle, grouped', 8]
  )
  # Four, three and one of the eight images.
  branches = [model.cost_in_parts(s, 8)[1].madds for s in model.routing_space]
  spent = np.dot(branches, [4, 3, 1]) / 8
  np.testing.assert_allclose(
    ratios['realised'],
    median['dispatch', 'all widest', 8] / tiled / (branches[2] / spent),
    rtol=1e-12,
  )
  assert (
    ratios['gradient_over_forward']
    == median['training', 'widest, gradient', 4]
    / median['training', 'widest, forward', 4]
  )
  start = written['lists']['start_up_seconds']
  assert ratios['warm_over_cold_start'] == start['warm'] / start['cold']
  assert ratios['pipeline_over_pillow'] == {
    size: median['input pipeline', f'Pillow, {size}', 32]
    / median['input pipeline', f'ds_jax, {size}', 32]
    for size in ('500 x 375', '1600 x 1200')
  }
  used = written['lists']['memory_bytes']
  assert (
    ratios['routed_over_widest_memory']
    == used['routed'] / used['largest bucket']
  )
  # Those of the images and of all that the model has, at least.
  stored = sum(a.nbytes for a in jax.tree.leaves(models.variables_of(model)))
  assert used['routed'] > stored + 8 * 8 * 8 * 3
  # Of the budgets, 40% and 60% of the largest are below the narrowest's cost.
  routers = {r.name: r.madds for r in rows if r.section == 'routers'}
  assert list(routers) == [
    'bucket 0', 'bucket 1', 'bucket 2', "the run's gate", 'gate at 80%',
    'cascade at 80%',
  ]  # fmt: skip
  assert routers['bucket 2'] == model.cost(model.routing_space[2], 8).madds
  assert path.with_suffix('.png').stat().st_size > 1000
  printed = capsys.readouterr().out
  assert all(row.name in printed for row in rows)


def test_ways_to_dispatch_agree():
  model = ds_jax.create_model(**micro.MODEL)
  subject = forward.Subject(model, 8)
  ways = {w.name: w.call for w in forward.dispatch_ways(subject, 8)}
  tiled = np.asarray(ways['tiled']())
  np.testing.assert_allclose(ways['vmapped switch'](), tiled, rtol=1e-5)
  # The grouped images are the same features under other buckets: compare the
  # one bucket order that both have.
  buckets = np.random.default_rng(0).permutation([0] * 4 + [1] * 3 + [2])
  alike = buckets == [0] * 4 + [1] * 3 + [2]
  assert alike.any()
  np.testing.assert_allclose(
    np.asarray(ways['oracle, grouped']())[alike], tiled[alike], rtol=1e-5
  )


def test_forced_routers_run_the_bucket_of_their_name():
  subject = forward.Subject(ds_jax.create_model(**micro.MODEL), 8)
  images = np.asarray(subject.images(1))
  for bucket in range(3):
    forced = subject.routed_to(bucket)(images)
    assert forced.buckets.tolist() == [bucket]
    np.testing.assert_allclose(
      forced.logits, subject.own(images, subnet=bucket).logits, rtol=1e-5
    )


def test_comparing_without_its_packages_says_what_to_install(
  monkeypatch,
):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == 'jax2onnx':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  subject = forward.Subject(ds_jax.create_model(**micro.MODEL), 8)
  with pytest.raises(ImportError, match='install --no-deps jax2onnx'):
    onnxruntime.compare(subject, [0], [1], seconds=0)


def test_a_bucket_that_does_not_exist_is_refused():
  model = ds_jax.create_model(**micro.MODEL)
  with pytest.raises(ValueError, match=r'expected some of \(0, 1, 2\)'):
    forward.Subject(model, 8, buckets=(0, 3))


def test_chosen_buckets_are_compared_with_the_last_of_them():
  model = ds_jax.create_model(**micro.MODEL)
  ways = forward.subnet_ways(forward.Subject(model, 8, (0, 1)), [2])
  assert {way.name.partition(',')[0] for way in ways} == {
    'bucket 0',
    'bucket 1',
  }
  assert {way.reference.partition(',')[0] for way in ways} == {'bucket 1'}


def test_what_is_measured_is_written_at_once(tmp_path, monkeypatch):
  def stop(ways, seconds):
    if ways[0].section != 'matmul':
      raise KeyboardInterrupt
    return [dataclasses.replace(row('2048', [0.5]), section='matmul')]

  monkeypatch.setattr(timing, 'time_in_turn', stop)
  path = tmp_path / 'benchmark.json'
  with pytest.raises(KeyboardInterrupt):
    command.run(
      command.Options(
        model='ds_vit_cifar', sections=['sub-networks'], json=str(path)
      )
    )
  (only,) = json.loads(path.read_text())['rows']
  assert only['section'] == 'matmul'


def test_a_section_that_does_not_exist_is_refused(capsys):
  with pytest.raises(SystemExit):
    command.main(['--model=ds_mobilenet', '--sections=training,speed'])
  assert "'speed' is not one of sub-networks, " in capsys.readouterr().err


def test_a_sub_network_runs_in_onnx_runtime(tmp_path):
  pytest.importorskip('jax2onnx')
  pytest.importorskip('onnxruntime')
  subject = forward.Subject(ds_jax.create_model(**micro.MODEL), 8)
  for form in onnxruntime.FORMS:
    path = onnxruntime._export(subject, 1, 2, form, tmp_path)
    assert len(onnxruntime._run(path, subject.images(2), seconds=0)) >= 3
