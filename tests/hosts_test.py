"""What hosts check and agree on; `processes_test.py` has two of them."""

import pathlib

import pytest

import ds_jax
from ds_jax import hosts


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'num_processes': 2}, '--coordinator_address is missing: give all of'),
    (
      {'coordinator_address': 'h:1', 'num_processes': 2},
      '--process_id is missing',
    ),
    (
      {'coordinator_address': 'host', 'num_processes': 2, 'process_id': 0},
      '--coordinator_address=host: expected HOST:PORT',
    ),
  ],
)
def test_incomplete_or_wrong_flags_are_refused(arguments, message):
  with pytest.raises(hosts.HostError, match=message):
    hosts.initialize(**arguments)


def test_code_hash_depends_on_the_code(tmp_path):
  assert hosts._code_hash().startswith(ds_jax.__version__)
  root = pathlib.Path(hosts.__file__).parent
  for name in ('hosts.py', 'parallel.py'):
    (tmp_path / name).write_bytes((root / name).read_bytes())
  before = hosts._code_hash(tmp_path)
  assert hosts._code_hash(tmp_path) == before
  with (tmp_path / 'hosts.py').open('a') as file:
    file.write('#')
  assert hosts._code_hash(tmp_path) != before


@pytest.mark.parametrize('error', [ValueError, OSError])
def test_only_a_lost_peer_is_taken_for_one(error, monkeypatch):
  monkeypatch.setattr(hosts.jax.distributed, 'is_initialized', lambda: True)
  assert hosts.is_lost_peer(error('UNKNOWN: Gloo AllGather failed: [...]'))
  assert not hosts.is_lost_peer(error('Connection timed out: /nfs/run'))


def test_one_process_agrees_with_itself():
  assert hosts.gather({'a': [1, 'ü']}) == [{'a': [1, 'ü']}]
  assert hosts.from_first(lambda: 3) == 3
  hosts.check_same_run({'seed': 0})


def test_an_error_that_is_no_lost_peer_keeps_its_traceback():
  try:
    raise RuntimeError('Out of memory')
  except RuntimeError as error:
    text = hosts.explain(error)
  assert 'Traceback' in text and 'RuntimeError: Out of memory' in text
