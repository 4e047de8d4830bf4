"""What a process that computes on the CPU itself does better with."""

import ctypes
import sys

import jax
from absl import logging

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
  """Lets a process on CPU reuse the memory of one call in the next.

  XLA:CPU takes a call's temporary memory from `malloc` and gives it back, and
  glibc asks the kernel for such large pieces each time: every page is faulted
  in and zeroed again. Afterwards the process keeps the most memory that it ever
  used.

  Only the main thread's heap can keep pieces above 64 MB, so calls are no
  longer handed to another thread. Call this in the main thread before JAX
  computes anything. Does nothing where there is no glibc.
  """
  if sys.platform != 'linux':
    return
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return
  mallopt(_M_MMAP_MAX, 0)
  mallopt(_M_TRIM_THRESHOLD, -1)
  try:
    jax.config.update('jax_cpu_enable_async_dispatch', False)
  except AttributeError:
    logging.warning(
      'JAX %s has no jax_cpu_enable_async_dispatch: calls may run in a thread'
      ' that keeps no memory, and be slower.',
      jax.__version__,
    )
