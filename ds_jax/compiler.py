"""Options of XLA, and the platform it compiles for."""

import functools
import os

import jax
from absl import logging

# LLVM takes vectors of half the width by default.
WIDE_VECTORS = {'xla_cpu_prefer_vector_width': 512}
# XLA:CPU's default makes all of a network's slices first, and keeps them.
SLICES_WHEN_NEEDED = {
  'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
}
# By default convolutions and loops end a CUDA graph. With them the routed
# program is one graph, and the device follows switch and tiles by itself.
_GRAPH_OPTION = 'xla_gpu_enable_command_buffer'
ONE_GRAPH = {
  _GRAPH_OPTION: (
    'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,'
    'CONVOLUTION,WHILE'
  )
}
_CPU_INFO = '/proc/cpuinfo'

Options = dict[str, int | str]


def platform() -> str:
  """Returns what JAX lowers for here: `cpu`, `cuda`, `rocm` or `tpu`."""
  backend = jax.default_backend()
  if backend != 'gpu':
    return backend
  return 'rocm' if 'rocm' in runtime_version().lower() else 'cuda'


def runtime_version() -> str:
  """Returns what the devices' runtime says of itself; '' if it doesn't."""
  # Neither attribute is documented.
  client = getattr(jax.devices()[0], 'client', None)
  return getattr(client, 'platform_version', '')


def options_for_training() -> Options | None:
  """Returns options for `jax.jit`; None where there are none to give.

  Where there is AVX-512, it fills whole registers.
  """
  options = {}
  if jax.default_backend() == 'cpu' and _has_wide_vectors():
    options = WIDE_VECTORS
  return known(options) or None


def options_for_inference(*, slices_weights: bool = False) -> Options | None:
  """Returns options for `jax.jit` of a forward pass, as those for training.

  On an NVIDIA GPU there is one CUDA graph, unless the flag
  `xla_gpu_enable_command_buffer` is set in the environment.

  Args:
    slices_weights: whether it slices in the call. (What spares memory there
      makes a training step slower.)
  """
  options = options_for_training() or {}
  here = platform()
  if slices_weights and here == 'cpu':
    options = options | SLICES_WHEN_NEEDED
  if here == 'cuda' and _GRAPH_OPTION not in os.getenv('XLA_FLAGS', ''):
    options = options | ONE_GRAPH
  return known(options) or None


def known(options: Options) -> Options:
  """Returns those options that this XLA knows; it warns of the others, once.

  They come and go with its releases, and none changes a result.
  """
  return {k: v for k, v in options.items() if _is_known(k, v)}


@functools.cache
def _is_known(name: str, value: int | str) -> bool:
  lowered = jax.jit(lambda: 0).lower()
  try:
    lowered.compile({name: value})
  # What XLA raises has changed with its releases, too.
  except Exception as error:
    logging.warning(
      "XLA's option %s=%s is left out, since this XLA does not take it: %s",
      name,
      value,
      error,
    )
    return False
  return True


def _has_wide_vectors() -> bool:
  try:
    with open(_CPU_INFO) as file:
      return 'avx512f' in file.read().split()
  except OSError:
    return False
