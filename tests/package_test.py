"""What importing the package and its commands costs and prints."""

import json
import subprocess
import sys

import pytest

import ds_jax
from ds_jax import summary


def _python(code):
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout


def test_import_loads_nothing_heavy():
  heavy = _python(
    'import sys, ds_jax; print(sorted({m.partition(".")[0] for m in'
    ' sys.modules} & {"jax", "flax", "numpy", "orbax", "grain"}))'
  )
  assert heavy.strip() == '[]'


def test_the_commands_need_no_tensorflow_and_no_torch():
  heavy = _python(
    'import sys, ds_jax.main, ds_jax.convert, ds_jax.summary;'
    ' print(sorted({m.partition(".")[0] for m in sys.modules}'
    ' & {"tensorflow", "torch"}))'
  )
  assert heavy.strip() == '[]'


def test_every_public_name_loads():
  for name in ds_jax.__all__:
    assert getattr(ds_jax, name) is not None
  assert set(ds_jax.__all__) <= set(dir(ds_jax))


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
    _ = ds_jax.creat_model


def test_summary_prints_the_published_table(capsys):
  summary.main(['ds_mobilenet', '--image_size=224', '--json'])
  rows = json.loads(capsys.readouterr().out)
  assert [round(row['madds'] / 1e6) for row in rows] == [
    *(133, 153, 175, 200, 226, 255, 286, 319, 355, 393, 433, 475, 519, 565),
    820,
  ]
  assert [row['index'] for row in rows] == list(range(15))
  assert all(row['params'] > 0 for row in rows)


def test_summary_table_is_for_people(capsys):
  summary.main(['ds_mobilenet_tiny', '--num_classes=10'])
  out = capsys.readouterr().out
  assert 'ds_mobilenet_tiny, 32 pixels, 10 classes' in out
  assert '16 kernel=3 | 32 kernel=3 | 48 kernel=3 | 16 kernel=3 | 32' in out
