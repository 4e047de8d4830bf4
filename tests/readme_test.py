"""What the README shows is what works."""

import importlib.util
import pathlib
import re
import shlex

import numpy as np
import pytest

import ds_jax
import micro
from ds_jax import export, summary

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / 'README.md').read_text()


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _README, re.DOTALL)


def _commands():
  lines = [line for block in _blocks('sh') for line in block.splitlines()]
  return [part for line in lines for part in line.split(' && ')]


@pytest.fixture
def run(tmp_path):
  """A finished run's checkpoint, without the run."""
  micro.save_finished_run(tmp_path)
  return tmp_path


def test_predicting_in_three_lines_and_budgets(run, capsys):
  three_lines, budgets, _ = _blocks('python')
  assert len(three_lines.splitlines()) == 3
  names = {'images': np.zeros((5, 8, 8, 3), np.uint8)}
  exec(three_lines.replace('runs/digits', str(run)), names)
  labels = capsys.readouterr().out.strip()
  assert re.fullmatch(r'\[\d \d \d \d \d\]', labels)
  # The narrowest of so small a model costs more than 40% of the dearest.
  exec(budgets.replace('0.4', '0.9'), names)
  assert names['cheap'](names['images']).labels.shape == (5,)
  assert len(names['better'].router.runs) == 2


def test_exporting(run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (command,) = [c for c in _commands() if 'ds_jax.export' in c]
  command = command.replace('runs/digits', str(run)).replace('0.4', '0.9')
  export.main(shlex.split(command)[3:])
  assert re.search(r'digits.ds: \d+\.\d MB, batch 16', capsys.readouterr().out)
  *_, code = _blocks('python')
  names = {'ds_jax': ds_jax, 'images': np.zeros((20, 8, 8, 3), np.uint8)}
  exec(code, names)
  assert names['network'](names['images']).labels.shape == (20,)
  with pytest.raises(SystemExit):
    export.main(shlex.split(command.replace('--fraction=0.9', ''))[3:])
  assert '--router=cascade needs a budget' in capsys.readouterr().err


def test_the_routers_page_runs(run):
  page = (_ROOT / 'docs/routing.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  code = code.replace('runs/fashion', str(run)).replace('0.4', '0.9')
  code = code.replace('2e6', '4e3')
  exec(code, {'ds_jax': ds_jax, 'images': np.zeros((5, 8, 8, 3), np.uint8)})


def test_there_are_two_commands_to_start_with():
  start = _README[_README.index('## Start') : _README.index('Then predict')]
  commands = re.findall(r'```sh\n(.*?)```', start, re.DOTALL)
  assert len(commands) == 2
  assert all(len(command.splitlines()) == 1 for command in commands)
  assert '--config=configs/ds_digits.py' in commands[0]
  assert commands[1].strip().endswith('pytest')


def test_commands_name_modules_and_files_that_exist():
  assert len(_commands()) > 6
  for command in _commands():
    for word in shlex.split(command):
      if word.startswith('--config=configs/'):
        assert (_ROOT / word.removeprefix('--config=')).exists(), word
      if word.startswith('ds_jax.'):
        assert importlib.util.find_spec(word), word


def test_nothing_is_left_to_fill_in():
  assert not re.search(r'@[A-Z]+@|TODO|TBD', _README)


def test_summary_command(capsys):
  (command,) = [c for c in _commands() if 'ds_jax.summary' in c]
  summary.main(shlex.split(command)[3:])
  assert '132,890,144' in capsys.readouterr().out


@pytest.mark.parametrize('name', re.findall(r'`(ds_\w+\.py)`', _README))
def test_configs_of_the_table_exist(name):
  assert (_ROOT / 'configs' / name).exists()
