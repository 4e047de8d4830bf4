"""What a run does with its time: goodput, traces, memory, and a watchdog.

`clu.periodic_actions` has some of it, but imports TensorFlow.
"""

import contextlib
import faulthandler
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
from absl import logging

from ds_jax import config as config_lib

# Lowering, and compiling or reading from the cache.
_COMPILE_EVENTS = (
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)


class Clock:
  """Shares of the time since the last reading.

  What is neither waiting for data, nor compiling, evaluating or saving is
  stepping: goodput. (On the host: while it waits for data, the device may still
  be at work. Tracing, before a program is compiled, is counted as stepping.)
  """

  KINDS = ('data', 'compile', 'evaluate', 'save')

  def __init__(self):
    self._seconds = dict.fromkeys(self.KINDS, 0.0)
    self._since = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def close(self) -> None:
    """Stops listening."""
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  @contextlib.contextmanager
  def spent_on(self, kind: str) -> Iterator[None]:
    """Counts what runs inside, less what is compiled there."""
    start, compiled = time.monotonic(), self._seconds['compile']
    try:
      yield
    finally:
      compiled = self._seconds['compile'] - compiled
      self._seconds[kind] += time.monotonic() - start - compiled

  def read(self) -> dict[str, float]:
    """Returns `goodput` and `share/KIND` since the last reading."""
    elapsed = max(time.monotonic() - self._since, 1e-9)
    shares = {f'share/{k}': s / elapsed for k, s in self._seconds.items()}
    self._seconds = dict.fromkeys(self.KINDS, 0.0)
    self._since = time.monotonic()
    return {'goodput': 1 - sum(shares.values()), **shares}

  def _on_event(self, event: str, seconds: float, **kwargs) -> None:
    del kwargs
    if event in _COMPILE_EVENTS:
      self._seconds['compile'] += seconds


class Profile:
  """A trace of the steps that the config names."""

  def __init__(self, config: config_lib.MonitorConfig, workdir: pathlib.Path):
    self._config = config
    self._directory = workdir / 'profile'
    self._runs = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Runs one step of the schedule inside, by its number over all phases."""
    config = self._config
    if number == config.profile_step:
      jax.profiler.start_trace(self._directory)
      self._runs = True
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if self._runs and number >= config.profile_step + config.profile_steps - 1:
      self.close()

  def close(self) -> None:
    """Ends a trace that is still open."""
    if not self._runs:
      return
    self._runs = False
    try:
      # Steps that are still on their way belong to it.
      jax.block_until_ready(jax.live_arrays())
    finally:
      jax.profiler.stop_trace()
    logging.info('A trace is in %s.', self._directory)


class Watchdog:
  """Writes all threads' stacks to stderr when nothing has happened for long.

  In a thread of `faulthandler`'s, which runs even while Python is stuck in
  somebody's C.
  """

  def __init__(self, seconds: float):
    """Starts watching; 0 seconds never does."""
    self._seconds = seconds
    self.reset()

  def reset(self) -> None:
    """Notes that something got done."""
    if self._seconds:
      faulthandler.dump_traceback_later(
        self._seconds, repeat=True, file=sys.__stderr__
      )

  def close(self) -> None:
    """Stops watching."""
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()


def device_memory() -> dict[str, float]:
  """Returns the first device's peak, in GiB, where it is told (not on CPU)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' not in stats:
    return {}
  return {'device_memory_gib': stats['peak_bytes_in_use'] / 2**30}
