"""What hosts check and agree on; `processes_test.py` has two of them."""

import configparser
import json
import pathlib
import re
import subprocess
import sys

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
  # A wheel has them there, a clone beside.
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/mine.py').write_text('pass')
  assert hosts._code_hash(tmp_path) == before
  with (tmp_path / 'hosts.py').open('a') as file:
    file.write('#')
  assert hosts._code_hash(tmp_path) != before


_COORDINATION = "[type.googleapis.com/tensorflow.CoordinationServiceError='']"
# Of JAX 0.10 where a process is killed; of NCCL as users report them.
_LOST = (
  'UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc'
  ':547] Connection closed by peer [127.0.0.1]:60618',
  'UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc'
  ':538] Read error [127.0.0.1]:57581: Connection reset by peer',
  'UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/'
  'unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to'
  ' complete',
  'INTERNAL: external/xla/xla/service/gpu/nccl_utils.cc:216: NCCL operation'
  ' async_err failed: remote process exited or there was a network error',
  'INTERNAL: NCCL operation ncclAllReduce(...) failed: unhandled system error'
  ' (run with NCCL_DEBUG=INFO for details). Last NCCL warning(error) log entry'
  " (may be unrelated) 'socketProgressOpt: Call to recv from 10.0.0.2<33759>"
  " failed : Connection reset by peer'.",
  'INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1'
  ' heartbeat timeout. This indicates that the remote task has failed, got'
  ' preempted, or crashed unexpectedly. Check the task logs for an earlier'
  f' error. {_COORDINATION}. Barrier Id: never::0, Task: 1\n\nRPC: /xla'
  '.coordination.CoordinationService/Barrier',
  'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):'
  f'\n1\nThe tasks have crashed. {_COORDINATION}',
  'UNAVAILABLE: Failed to send RPC to coordination service. Either the leader'
  ' task was preempted/died/restarted unexpectedly or this task is experiencing'
  ' network issues.',
)
_ITS_OWN = (
  'Connection timed out: /nfs/run',
  # Of a bucket, or a data set over the network.
  "[Errno 104] Connection reset by peer: 'https://storage.googleapis.com'",
  'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes'
  ' for ncclAllReduce scratch space.',
  'INTERNAL: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed:'
  ' unhandled cuda error (run with NCCL_DEBUG=INFO for details). Last NCCL'
  " warning(error) log entry (may be unrelated) 'Cuda failure 2 'out of"
  " memory''.",
  'INTERNAL: NCCL operation ncclGroupEnd() failed: invalid usage (run with'
  ' NCCL_DEBUG=WARN for details).',
  'libnccl.so.2: cannot open shared object file: No such file or directory',
  '[enforce fail at external/gloo/gloo/transport/tcp/pair.cc:459]'
  " op.preamble.length <= op.nbytes. 16 vs 8. Received data size doesn't match"
  ' expected size. Is there a distributed collective mismatch in your code?',
  'INVALID_ARGUMENT: Gloo all-reduce: unsupported type F8E4M3FN',
  f'ALREADY_EXISTS: Config key nccl/0 already exists. {_COORDINATION}',
  'In config.parallel: heartbeat_seconds=0: expected at least 1.',
)


@pytest.mark.parametrize('message', _LOST)
@pytest.mark.parametrize('error', [ValueError, OSError])
def test_a_lost_peer_is_told_by_what_is_said_of_it(error, message, monkeypatch):
  assert not hosts.is_lost_peer(error(message))  # there are no others
  monkeypatch.setattr(hosts.jax.distributed, 'is_initialized', lambda: True)
  assert hosts.is_lost_peer(error(message))


@pytest.mark.parametrize('message', _ITS_OWN)
def test_a_failure_of_its_own_is_no_lost_peer(message, monkeypatch):
  monkeypatch.setattr(hosts.jax.distributed, 'is_initialized', lambda: True)
  assert not hosts.is_lost_peer(RuntimeError(message))
  assert 'lost another' not in hosts.explain(RuntimeError(message))


@pytest.mark.parametrize('message', [*_LOST, *_ITS_OWN])
def test_every_error_is_shown_whole(message, monkeypatch):
  monkeypatch.setattr(hosts.jax.distributed, 'is_initialized', lambda: True)

  def collective():
    raise RuntimeError(message)

  try:
    collective()
  except RuntimeError as error:
    text = hosts.explain(error)
  traceback, _, said = text.partition('HostError: ')
  assert traceback.startswith('Traceback') and ', in collective' in traceback
  assert message in traceback
  if message in _LOST:
    assert said.startswith('process 0 of 1 lost another one: ' + message[:60])
    assert 'start the same command again on all' in said


def test_one_process_agrees_with_itself():
  assert hosts.gather({'a': [1, 'ü']}) == [{'a': [1, 'ü']}]
  assert hosts.from_first(lambda: 3) == 3
  hosts.check_same_run({'seed': 0})


# What reads and writes, but neither draws nor computes.
_DECIDE_NOTHING = {
  'absl-py',
  'clu',
  'etils',
  'importlib_resources',
  'ml_collections',
  'tqdm',
}


def test_every_library_that_is_required_is_compared():
  setup = configparser.ConfigParser()
  setup.read(pathlib.Path(hosts.__file__).parents[1] / 'setup.cfg')
  required = {
    re.match(r'[\w-]+', line)[0]
    for line in setup['options']['install_requires'].splitlines()
    if line and not line.startswith('#')
  }
  assert {'numpy', 'grain', 'flax', 'optax', 'orbax-checkpoint'} < required
  versions = hosts.versions()
  assert required - _DECIDE_NOTHING <= versions.keys()
  assert all(versions.values())


def _another_host_with(monkeypatch, name, value):
  """Process 1 has the same facts but for one, which process 0 has, too."""
  monkeypatch.setattr(hosts.jax, 'process_count', lambda: 2)

  def gather(fact):
    one, other = (json.loads(json.dumps(fact)) for _ in range(2))
    assert name in other['facts']
    other['facts'][name] = value
    return [one, {**other, 'host': 'b'}]

  monkeypatch.setattr(hosts, 'gather', gather)


@pytest.mark.parametrize(
  'name',
  [
    *('numpy', 'grain', 'flax', 'optax', 'orbax-checkpoint', 'ml_dtypes'),
    *('pillow', 'scikit-learn', 'jaxlib', 'python', 'platform'),
    *('jax_default_prng_impl', 'jax_threefry_partitionable'),
    *('jax_enable_x64', 'jax_default_matmul_precision'),
  ],
)
def test_what_decides_a_draw_or_a_result_is_compared(name, monkeypatch):
  _another_host_with(monkeypatch, name, '0.0.1')
  with pytest.raises(
    hosts.HostError,
    match=f"Process 1 on b differs .*: {name} is '0.0.1', and .* there.* with"
    ' the same libraries',
  ):
    hosts.check_same_run({'seed': 0})


def test_the_number_of_images_is_compared(monkeypatch):
  _another_host_with(monkeypatch, 'images in the gate part', 9)
  with pytest.raises(
    hosts.HostError,
    match='images in the gate part is 9, and 8 there. Give every host a whole',
  ):
    hosts.check_same_images({'train': 80, 'gate': 8})


def test_a_host_without_a_library_says_so(monkeypatch):
  def version(name):
    raise hosts.importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(hosts.importlib.metadata, 'version', version)
  assert hosts.versions()['numpy'] is None


def test_a_jax_without_what_several_processes_need_is_named():
  # In a process of its own, since whoever imports it first decides.
  code = (
    'import sys; sys.modules["jax.experimental.multihost_utils"] = None\n'
    'from ds_jax import hosts\n'
    'print(hosts.gather({"a": 1}))\n'
    'hosts.jax.process_count = lambda: 2\n'
    'try:\n'
    '  hosts.gather(1)\n'
    'except hosts.HostError as error:\n'
    '  print(error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  alone, together = done.stdout.splitlines()
  assert alone == "[{'a': 1}]"
  assert 'has no jax.experimental.multihost_utils' in together
  assert 'run a single one, or install JAX' in together
