"""The gate leaves nothing running, and installs only when it has to."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

_GATE = pathlib.Path(__file__).parents[1] / '.ci/run'
_SHELLCHECK = pathlib.Path(sys.executable).parent / 'shellcheck'

# A Python whose environments are a folder with copies of itself. What pip has
# installed is in `freeze`, what pytest does in `tests`.
_PYTHON = """#!/usr/bin/env bash
case $* in
  '-c import ensurepip') ;;
  -VV) echo "Python" ;;
  '-m venv --clear '*)
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
    ln -s "$(type -P true)" "$4/bin/ruff" ;;
  '-m pip freeze '*) cat freeze ;;
  '-m pip install '*) echo "$*" >>installed ;;
  '-m pytest '*) source ./tests ;;
  *) exit 9 ;;
esac
"""
# They hold the gate's output, which so ends only when they do. Started by a
# shell in the background, they ignore SIGINT.
_SLEEPING = 'touch started; sleep 99 & sleep 99 &'


class _Repository:
  """A folder with the gate, in which two Pythons are found."""

  def __init__(self, root):
    self.root = root
    (root / '.ci').mkdir()
    shutil.copy(_GATE, root / '.ci')
    (root / 'bin').mkdir()
    for version in ('3.11', '3.12'):
      python = root / 'bin' / f'python{version}'
      python.write_text(_PYTHON)
      python.chmod(0o755)
      self.write(f'.ci/constraints-{version}.txt', 'jax==1\n')
    self.write('freeze', 'jax==1\n')
    self.write('setup.cfg', '')
    self.write('pyproject.toml', '')
    self.write('tests', '')

  def write(self, name, text):
    (self.root / name).write_text(text)

  def lines(self, name):
    path = self.root / name
    return path.read_text().splitlines() if path.exists() else []

  def start(self, *arguments):
    # Where the tests run in the background, SIGINT is ignored, for good.
    return subprocess.Popen(
      ['env', '--default-signal=INT', self.root / '.ci/run', *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {'PATH': f'{self.root}/bin:{os.environ["PATH"]}'},
    )

  def run(self, *arguments):
    """The exit status, what was printed, and what pip was told to install."""
    (self.root / 'installed').unlink(missing_ok=True)
    process = self.start(*arguments)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output, self.lines('installed')


@pytest.fixture
def repository(tmp_path):
  return _Repository(tmp_path)


def test_shellcheck_finds_nothing():
  done = subprocess.run([_SHELLCHECK, _GATE], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('status', [7, 0])
def test_what_tests_leave_running_is_ended(repository, status):
  repository.write('tests', f'{_SLEEPING} exit {status}')
  code, output, _ = repository.run()
  assert (repository.root / 'started').exists()
  assert code == status, output


def _interrupt(repository, number):
  """Starts the gate, sends it a signal in its tests, and waits for its end."""
  process = repository.start()
  deadline = time.monotonic() + 20
  while not (repository.root / 'started').exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(number)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 128 + number, output


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_gate_leaves_nothing_running(repository, number):
  repository.write('tests', f'{_SLEEPING} wait; touch survived')
  _interrupt(repository, number)
  assert not (repository.root / 'survived').exists()


def test_an_interrupted_test_cleans_up(repository):
  repository.write(
    'tests', 'trap "touch cleaned; exit" INT; touch started; sleep 99 & wait'
  )
  _interrupt(repository, signal.SIGTERM)
  assert (repository.root / 'cleaned').exists()


def test_an_environment_is_made_anew_when_what_it_depends_on_changed(
  repository,
):
  code, output, installed = repository.run()
  assert code == 0, output
  assert len(installed) == 4  # setuptools and ours, for two Pythons
  assert all('--constraint .ci/constraints-3.1' in line for line in installed)
  assert repository.run() == (0, output, [])

  repository.write('setup.cfg', 'more')
  assert len(repository.run()[2]) == 4
  repository.write('.ci/constraints-3.12.txt', 'jax==1\nnumpy==2\n')
  assert len(repository.run()[2]) == 2
  # By hand, which the gate does away with.
  repository.write('freeze', 'jax==1\nnumpy==2\n')
  assert len(repository.run()[2]) > 0


def test_a_package_without_a_release_named_is_an_error(repository):
  repository.write('freeze', 'jax==1\nnumpy==2\n')
  code, output, _ = repository.run()
  assert code == 1
  assert '.ci/constraints-3.11.txt does not name\nnumpy==2\n' in output
  assert 'Run .ci/run --renew, and commit' in output
  # It is asked again.
  assert len(repository.run()[2]) == 2


def test_renewing_installs_the_newest_and_names_them(repository):
  repository.run()
  repository.write('freeze', 'jax==2\nnumpy==2\n')
  code, output, installed = repository.run('--renew')
  assert code == 0, output
  assert len(installed) == 4
  assert not any('constraints-3.1' in line for line in installed)
  for version in ('3.11', '3.12'):
    named = repository.lines(f'.ci/constraints-{version}.txt')
    assert named == ['jax==2', 'numpy==2']
  assert repository.run()[2] == []


def test_another_argument_is_refused(repository):
  code, output, installed = repository.run('--new')
  assert code == 2 and installed == []
  assert "Unknown argument '--new'; expected --renew or nothing" in output


_TESTS = """
import pytest
from absl.testing import parameterized

class OneTest(parameterized.TestCase):
  @parameterized.parameters(3, 4)
  def test_numbers(self, number): pass

  @parameterized.named_parameters(('b', 3), ('a', 4))
  def test_names(self, number): pass

  def test_numbers_of_it(self): pass

class OtherTest(OneTest): pass

@pytest.mark.parametrize('x', [3, 4])
@pytest.mark.parametrize('y', [5, 6])
def test_pairs(x, y): pass

def test_plain(): pass
"""


def test_each_once_leaves_out_parameters_and_no_test(tmp_path):
  (tmp_path / 'some_test.py').write_text(_TESTS)
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pytest', '-q', '-p', 'conftest'),
      *('-c', os.devnull, '--collect-only', '--each_once', 'some_test.py'),
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(_GATE.parents[1] / 'tests')},
  )
  found = re.findall(r'^some_test\.py::(\S+)$', done.stdout, re.MULTILINE)
  assert found == [
    *('OneTest::test_names_a', 'OneTest::test_numbers0'),
    *('OneTest::test_numbers_of_it', 'OtherTest::test_names_a'),
    *('OtherTest::test_numbers0', 'OtherTest::test_numbers_of_it'),
    *('test_pairs[5-3]', 'test_plain'),
  ]
