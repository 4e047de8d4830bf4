"""Test-wide settings: eight simulated devices, strict rank promotion.

XLA's CPU backend compiles at level 0: nearly all of the tests' time is
compilation, and no test's tolerance depends on the level. Where XLA still has
the emitters of before, which compile in less than half the time, it takes them.
What runs compile alike, in this process and in those of commands, is compiled
once.

The environment is set before jax starts its backend. NPROC widens the thread
pool: with fewer than two threads a simulated device, collectives in flight
deadlock on a small machine.
"""

import gc
import importlib.metadata
import inspect
import os
import shutil
import tempfile

# XLA ends a process that gives it a flag which it doesn't know.
_JAXLIB = importlib.metadata.version('jaxlib').split('.')
_EMITTERS = (
  ['--xla_cpu_use_fusion_emitters=false'] if _JAXLIB[:2] == ['0', '10'] else []
)

os.environ.setdefault('NPROC', '16')
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    *_EMITTERS,
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_CACHE = tempfile.mkdtemp(prefix='ds_jax_compiled_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Tracing makes so many objects that collecting them took a tenth of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser):
  parser.addoption(
    '--each_once',
    action='store_true',
    help='run each test with the first of its parameters alone',
  )


def pytest_collection_modifyitems(config, items):
  if config.getoption('each_once'):
    first = {}
    for item in items:
      # absl makes a method of its own for each of a test's parameters.
      test = item.cls, inspect.unwrap(item.function)
      first.setdefault(test, item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = [item for item in items if item in kept]
  if 'PYTEST_XDIST_WORKER' in os.environ:
    # Longest files first, lest one process ends with them alone.
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


def pytest_unconfigure():
  shutil.rmtree(_CACHE, ignore_errors=True)
