"""What a process that computes on the CPU itself does better with."""

import ctypes
import sys

import jax

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# LLVM takes vectors of half the width by default.
WIDE_VECTORS = {'xla_cpu_prefer_vector_width': 512}
# XLA:CPU's default makes all of a network's slices first, and keeps them.
SLICES_WHEN_NEEDED = {
  'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
}
_CPU_INFO = '/proc/cpuinfo'


def compiler_options(
  slices_weights: bool = False,
) -> dict[str, int | str] | None:
  """Returns options for `jax.jit`; None where there are none to give.

  Whole registers, where there is AVX-512, make DS-MobileNet 3 to 8% faster at
  224 pixels.

  Args:
    slices_weights: of a forward pass that slices in the call. (A training step
      is 8% slower with what spares memory there.)
  """
  if jax.default_backend() != 'cpu':
    return None
  options = WIDE_VECTORS if _has_wide_vectors() else {}
  return options | (SLICES_WHEN_NEEDED if slices_weights else {}) or None


def _has_wide_vectors() -> bool:
  try:
    with open(_CPU_INFO) as file:
      return 'avx512f' in file.read().split()
  except OSError:
    return False


def keep_freed_memory() -> None:
  """Lets a process on CPU reuse the memory of one call in the next.

  XLA:CPU takes a call's temporary memory from `malloc` and gives it back, and
  glibc asks the kernel for such large pieces anew each time: every page is
  faulted in and zeroed again, a fifth of the time of DS-MobileNet's narrowest
  bucket, and a quarter of a training step's. Afterwards the process keeps the
  most memory it ever used.

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
  jax.config.update('jax_cpu_enable_async_dispatch', False)
