"""Test-wide settings: eight simulated devices, strict rank promotion.

XLA's CPU backend compiles at level 0: nearly all of the tests' time is
compilation, and no test's tolerance depends on the level. What runs compile
alike, in this process and in those of commands, is compiled once.

The environment is set before jax starts its backend. NPROC widens the thread
pool: with fewer than two threads a simulated device, collectives in flight
deadlock on a small machine.
"""

import os
import shutil
import tempfile

os.environ.setdefault('NPROC', '16')
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_CACHE = tempfile.mkdtemp(prefix='ds_jax_compiled_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_unconfigure():
  shutil.rmtree(_CACHE, ignore_errors=True)
