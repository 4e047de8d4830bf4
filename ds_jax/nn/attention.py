"""Attention, by the fastest way that a device has.

Axes: N batch, T tokens, H heads, D a head's width.
"""

import jax
import jax.numpy as jnp

from ds_jax import compiler

# Of cuDNN's: what it computes in, the widest head, and the oldest GPU.
_DTYPES = (jnp.bfloat16, jnp.float16)
_MAX_HEAD_DIM = 128
_MIN_CAPABILITY = 8.0


def softmax_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, fused: bool
) -> jax.Array:
  """Softmax attention; all three and the result are (N, T, H, D).

  Args:
    query: (N, T, H, D).
    key: as query.
    value: as query.
    fused: whether cuDNN may compute it, where it can: in half precision on
      NVIDIA GPUs. It writes no scores to memory, and is faster. But it has no
      gradient for an odd number of tokens, runs only where it was traced for,
      and keeps programs for several devices out of the compilation cache.
  """
  by_cudnn = fused and _has_cudnn(query.dtype, query.shape[-1])
  return jax.nn.dot_product_attention(
    query, key, value, implementation='cudnn' if by_cudnn else 'xla'
  )


def _has_cudnn(dtype, head_dim) -> bool:
  return (
    dtype in _DTYPES
    and head_dim <= _MAX_HEAD_DIM
    and head_dim % 8 == 0
    and compiler.platform() == 'cuda'
    and float(getattr(jax.devices()[0], 'compute_capability', 0))
    >= _MIN_CAPABILITY
  )
