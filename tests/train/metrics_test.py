"""Scalars on disk, as lines and for TensorBoard."""

import json
import struct
import sys

from tensorboardX.proto import event_pb2

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
    'step': 3, 'phase': 'supernet', 'loss/widest': 0.5,
    'images_per_second': 10.0,
  }  # fmt: skip
  assert [row['step'] for row in rows] == [3, 6, 3, 6]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricWriter(tmp_path / 'run', enabled=False)
  writer.write(1, 'gate', {'madds': 1.0})
  writer.close()
  assert not (tmp_path / 'run').exists()


def test_tensorboard_gets_event_files(tmp_path):
  _write(tmp_path)
  (path,) = tmp_path.glob('events.out.tfevents.*')
  # As TensorBoard's format has them: length, its checksum, event, its checksum.
  data, found = path.read_bytes(), {}
  while data:
    (length,) = struct.unpack_from('<Q', data)
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[12 + length + 4 :]
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
  assert found == {
    ('supernet/loss/widest', 3): 0.5,
    ('supernet/images_per_second', 3): 10.0,
    ('gate/madds', 6): 100.0,
  }


def test_without_tensorboardx_there_are_no_event_files(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  _write(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
