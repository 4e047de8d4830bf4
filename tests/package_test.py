"""What importing the package and its commands costs and prints."""

import ast
import json
import pathlib
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


# Rooms from the ground up: a module imports its own room and those below.
_ROOMS = (
  ('version', 'paths', 'fields', 'validation', 'compiler', 'cpu'),
  ('config', 'hosts'),
  ('command_line', 'checkpoint', 'parallel'),
  ('nn', 'data'),
  ('models',),
  ('routing', 'convert'),
  ('evaluation', 'inference'),
  ('train',),
  ('summary', 'export', 'predict', 'benchmark'),
  ('main',),
)


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'ds_jax':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module.startswith('ds_jax.'):
      yield node.module.split('.')[1]
    elif isinstance(node, ast.Import):
      yield from (
        alias.name.split('.')[1]
        for alias in node.names
        if alias.name.startswith('ds_jax.')
      )


def test_imports_run_downward():
  level = {room: i for i, rooms in enumerate(_ROOMS) for room in rooms}
  root = pathlib.Path(ds_jax.__file__).parent
  seen = set()
  for path in root.rglob('*.py'):
    room = path.relative_to(root).parts[0].removesuffix('.py')
    if room in ('__init__', 'configs'):
      continue
    seen.add(room)
    for other in set(_imports(path)) - {room}:
      assert level[other] < level[room], f'{path} imports {other}'
  assert seen == level.keys()
