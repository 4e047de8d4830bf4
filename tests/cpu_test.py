"""Freed memory stays with the process."""

import subprocess
import sys

_SIZE = 64 << 20

_PROGRAM = f"""
import ctypes, sys
from ds_jax import cpu

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096

if sys.argv[1] == 'keep':
  cpu.keep_freed_memory()
before = resident()
pointer = libc.malloc({_SIZE})
libc.memset(pointer, 1, {_SIZE})
libc.free(pointer)
print(resident() - before)
"""


_CALLS = f"""
import resource, sys
from ds_jax import cpu
import jax
import jax.numpy as jnp

if sys.argv[1] == 'keep':
  cpu.keep_freed_memory()

@jax.jit
def run(x):
  # Twice as much as a heap of another thread than the main one can keep.
  wide = jnp.full({_SIZE // 2}, x)
  return jax.lax.fori_loop(0, 2, lambda _, y: y * x, wide).sum()

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.float32(1.5)
found = []
for _ in range(8):
  before = faults()
  jax.block_until_ready(run(x))
  found.append(faults() - before)
# The fewest: a small piece of something else, in between, may leave what a call
# has freed too short for the next one, once in a while.
print(min(found[2:]))
"""


def _run(program, argument):
  done = subprocess.run(
    [sys.executable, '-c', program, argument],
    check=True,
    capture_output=True,
    text=True,
  )
  return int(done.stdout)


def test_freed_memory_is_kept():
  # Without, glibc gives so large a piece back at once.
  assert _run(_PROGRAM, 'give back') < _SIZE / 4
  assert _run(_PROGRAM, 'keep') > _SIZE * 3 / 4


def test_a_call_takes_the_memory_of_the_last_one():
  pages = 2 * _SIZE / 4096
  assert _run(_CALLS, 'give back') > pages / 2
  assert _run(_CALLS, 'keep') < pages / 10
