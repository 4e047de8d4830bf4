"""The processes of a run, one a host: they start, agree and stop together.

Everything that they share (draws of sub-networks, the order of images, when to
save) follows from the config and the step, so it is equal by construction.
What can differ is checked at the start, or is decided by process 0.
"""

import collections
import hashlib
import importlib.metadata
import json
import pathlib
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from ds_jax import compiler


class HostError(Exception):
  """The processes can't run together, or no longer do."""


_LIBRARIES = (
  'array_record',
  'flax',
  'grain',
  'jax',
  'jaxlib',
  'ml_dtypes',
  'numpy',
  'optax',
  'orbax-checkpoint',
  'pillow',
  'scikit-learn',
  'tensorflow-datasets',
)
# Of the environment, which a host may have by itself.
_JAX_OPTIONS = (
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_enable_x64',
  'jax_threefry_partitionable',
)

# What JAX's runtime says where another process no longer answers: a connection
# of the collectives that broke, and the coordination service's heartbeats. The
# name of a library alone proves nothing: this process may lack memory for it.
_LOST_PEER = re.compile(
  r'(gloo|nccl).*(connection (closed|reset) by (remote )?peer|broken pipe'
  r'|connection refused|timed out waiting|remote process exited)'
  r'|heartbeat timeout|stopped sending heartbeats'
  r'|failed to send rpc to coordination service|barrier timed out',
  re.IGNORECASE | re.DOTALL,
)


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_seconds: int = 60,
) -> None:
  """Joins the processes of a run; before anything else of JAX.

  Without arguments JAX looks for Cloud TPU, GKE, SLURM or Open MPI; where there
  is none of them the process is alone.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which one this is.
    heartbeat_seconds: for how long one may be silent until the others end.

  Raises:
    HostError: if only some of the three are given, or one is impossible. Where
      the others don't come JAX waits for 5 minutes, and aborts.
  """
  given = {
    'coordinator_address': coordinator_address,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise HostError(
      f'--{missing[0]} is missing: give all of '
      + ', '.join(f'--{name}' for name in given)
      + ', or none where JAX finds the cluster by itself.'
    )
  address = coordinator_address
  if address and not re.fullmatch(r'.+:\d+', address):
    raise HostError(
      f'--coordinator_address={address}: expected HOST:PORT, for example'
      ' 10.0.0.1:8476.'
    )
  if num_processes:
    logging.info(
      'Waiting for %d processes to meet at %s ...', num_processes, address
    )
  try:
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=heartbeat_seconds
    )
  except ValueError as error:
    # What JAX raises where it detects no cluster.
    if missing and 'coordinator_address' in str(error):
      return
    raise HostError(f'The processes could not be joined: {error}') from error
  logging.info(
    'Process %d of %d, on %s.',
    jax.process_index(),
    jax.process_count(),
    socket.gethostname(),
  )


def check_same_run(config: Mapping[str, Any]) -> None:
  """Compares config, code, libraries and devices of all processes.

  Args:
    config: field to value, as it is after all flags.

  Raises:
    HostError: on every process, naming those that differ from process 0.
  """
  if jax.process_count() == 1:
    return
  _check_device_counts()
  device = jax.local_devices()[0]
  facts = {
    'ds_jax': _code_hash(),
    **versions(),
    'device': device.device_kind,
    'platform': compiler.runtime_version(),
    **{name: str(getattr(jax.config, name, None)) for name in _JAX_OPTIONS},
    **{f'config.{name}': value for name, value in config.items()},
  }
  _compare(
    facts,
    'Start the same command, from the same code and with the same libraries, on'
    ' every host.',
  )


def check_same_images(num_images: Mapping[str, int]) -> None:
  """Compares how many images all processes have.

  Args:
    num_images: by part of the data set.

  Raises:
    HostError: on every process, naming those that differ from process 0.
  """
  if jax.process_count() > 1:
    _compare(
      {f'images in the {part} part': n for part, n in num_images.items()},
      'Give every host a whole copy of the same data set.',
    )


def versions() -> dict[str, str | None]:
  """Returns the versions of what decides a draw, a pixel or a result.

  JAX draws weights, dropout and noise, Grain the order of images, and NumPy's
  Generator, whose stream is not promised from version to version, what
  augmentation does to them.
  """
  found = {'python': f'{sys.version_info.major}.{sys.version_info.minor}'}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def _compare(facts: Mapping[str, Any], advice: str) -> None:
  """Raises HostError on every process where one has other facts."""
  everyone = gather({'host': socket.gethostname(), 'facts': facts})
  first = everyone[0]
  complaints = [
    f'Process {index} on {other["host"]} differs from process 0 on'
    f' {first["host"]}: {differences}.'
    for index, other in enumerate(everyone)
    if (differences := _differences(other['facts'], first['facts']))
  ]
  if complaints:
    raise HostError(' '.join([*complaints, advice]))


def gather(value: Any) -> list[Any]:
  """Returns every process's value, by process; values are what JSON holds."""
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  if jax.process_count() == 1:
    return [json.loads(text.tobytes())]
  multihost_utils = _multihost_utils()
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(text)] = text
  texts = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:length].tobytes())
    for row, length in zip(texts, lengths, strict=True)
  ]


def from_first(decide: Callable[[], Any], *errors: type[Exception]) -> Any:
  """Returns what process 0 decides, on every process.

  Args:
    decide: returns what JSON holds; called on process 0 alone.
    *errors: what `decide` may raise, which then is raised on every process.
  """
  if jax.process_count() == 1:
    return decide()
  answer = None
  if jax.process_index() == 0:
    try:
      answer = {'value': decide()}
    except errors as error:
      kind = next(i for i, e in enumerate(errors) if isinstance(error, e))
      answer = {'error': str(error), 'kind': kind}
  answer = gather(answer)[0]
  if 'error' in answer:
    raise errors[answer['kind']](answer['error'])
  return answer['value']


def fetch(tree: Any) -> Any:
  """Returns whole NumPy arrays, of arrays that may be spread over processes.

  On CPU they may be views. While these live, JAX gives their buffers to no
  donation.
  """

  def whole(x):
    if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return _multihost_utils().process_allgather(x, tiled=True)
    return x

  tree = jax.device_get(jax.tree.map(whole, tree))
  return jax.tree.map(np.asarray, tree)


def is_lost_peer(error: Exception) -> bool:
  """Whether an error comes of another process being gone."""
  # It is a JaxRuntimeError, a ValueError, or what Orbax makes of them.
  return jax.distributed.is_initialized() and bool(
    _LOST_PEER.search(str(error))
  )


def explain(error: Exception) -> str:
  """Returns the traceback, and that another process is gone where one is."""
  text = ''.join(traceback.format_exception(error))
  if not is_lost_peer(error):
    return text
  return (
    f'{text}HostError: process {jax.process_index()} of {jax.process_count()}'
    f' lost another one: {str(error).splitlines()[0][:300]}\nLook for the first'
    ' error on the other hosts, and start the same command again on all of'
    ' them: it resumes from the last save.'
  )


class Termination:
  """Whether to save and end: SIGTERM came, to this process or to another.

  While it is entered, the signal is noted for the loop to act on. With several
  processes JAX's runtime notes it, tells the others, and agrees with them on
  the step after which all stop.
  """

  def __init__(self):
    self._received = False

  def __enter__(self) -> 'Termination':
    if not jax.distributed.is_initialized():
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *exc_info) -> None:
    if not jax.distributed.is_initialized():
      signal.signal(signal.SIGTERM, self._previous)

  def is_due(self, step: int) -> bool:
    """Whether to end after this step; to be asked once after each."""
    if jax.distributed.is_initialized():
      return _multihost_utils().reached_preemption_sync_point(step)
    return self._received

  def _receive(self, signum, frame) -> None:
    del signum, frame
    self._received = True


def _multihost_utils():
  """Imported where there are several processes: it is experimental."""
  try:
    from jax.experimental import multihost_utils
  except ImportError as error:
    raise HostError(
      f'JAX {jax.__version__} has no jax.experimental.multihost_utils, by which'
      ' processes agree: run a single one, or install JAX 0.10 to 0.12, which'
      ' have it.'
    ) from error
  return multihost_utils


def _differences(facts, expected) -> str:
  return '; '.join(
    f'{name} is {facts.get(name)!r}, and {expected.get(name)!r} there'
    for name in sorted(facts.keys() | expected.keys())
    if facts.get(name) != expected.get(name)
  )


def _check_device_counts():
  """A collective would fail on this in a way that tells nobody why."""
  counts = collections.Counter(d.process_index for d in jax.devices())
  usual = max(counts.values())
  fewer = {i: n for i, n in sorted(counts.items()) if n != usual}
  if fewer:
    found = ', '.join(f'process {i} has {n}' for i, n in fewer.items())
    raise HostError(
      f'Every process needs as many devices: {found}, and the others have'
      f' {usual}. Look for a device that is lost, or in use, there.'
    )


def _code_hash(root: pathlib.Path = pathlib.Path(__file__).parent) -> str:
  """The version, and a digest of the code that is installed."""
  from ds_jax import version

  digest = hashlib.sha256()
  # A wheel has the configs inside; what one says is compared by itself.
  configs = set((root / 'configs').glob('*.py'))
  for path in sorted(set(root.rglob('*.py')) - configs):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return f'{version.__version__}, {digest.hexdigest()[:12]}'
