"""Freed memory stays with the process."""

import subprocess
import sys

_SIZE = 64 << 20

_PROGRAM = f"""
import ctypes, sys
from ds_jax import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096

if sys.argv[1] == 'keep':
  memory.keep_freed_memory()
before = resident()
pointer = libc.malloc({_SIZE})
libc.memset(pointer, 1, {_SIZE})
libc.free(pointer)
print(resident() - before)
"""


def _kept(argument):
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM, argument],
    check=True,
    capture_output=True,
    text=True,
  )
  return int(done.stdout)


def test_freed_memory_is_kept():
  # Without, glibc gives so large a piece back at once.
  assert _kept('give back') < _SIZE / 4
  assert _kept('keep') > _SIZE * 3 / 4
