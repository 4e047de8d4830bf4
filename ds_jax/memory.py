"""The memory of the machine that runs on its own cores."""

import ctypes
import sys

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
  """Lets a process on CPU reuse the memory of one call in the next.

  XLA:CPU takes a call's temporary memory from `malloc` and gives it back, and
  glibc asks the kernel for such large pieces anew each time: every page is
  faulted in and zeroed again, a fifth of the time of DS-MobileNet's narrowest
  bucket. Afterwards the process keeps the most memory it ever used. Does
  nothing where there is no glibc.
  """
  if sys.platform != 'linux':
    return
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return
  mallopt(_M_MMAP_MAX, 0)
  mallopt(_M_TRIM_THRESHOLD, -1)
