"""Scalars on disk, with and without TensorFlow."""

import importlib.util
import json

import pytest

from ds_jax.train import metrics


def _write(folder):
  writer = metrics.MetricWriter(folder)
  writer.write(3, 'supernet', {'loss/widest': 0.5, 'images_per_second': 10.0})
  writer.write(6, 'gate', {'madds': 100.0})
  writer.close()


def test_rows_are_json_lines_and_reopening_appends(tmp_path):
  _write(tmp_path)
  _write(tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows[0] == {
    'step': 3, 'stage': 'supernet', 'loss/widest': 0.5,
    'images_per_second': 10.0,
  }  # fmt: skip
  assert [row['step'] for row in rows] == [3, 6, 3, 6]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricWriter(tmp_path / 'run', enabled=False)
  writer.write(1, 'gate', {'madds': 1.0})
  writer.close()
  assert not (tmp_path / 'run').exists()


def test_tensorboard_files_where_the_writer_is_installed(tmp_path):
  if not importlib.util.find_spec('tensorboard'):
    pytest.skip('The tf extra is not installed.')
  pytest.importorskip('tensorflow')
  from tensorboard.backend.event_processing import event_accumulator

  _write(tmp_path)
  events = event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  assert {'supernet/loss/widest', 'gate/madds'} <= set(events.Tags()['tensors'])
