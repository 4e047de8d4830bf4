"""The double-headed gate: channel attention and slimming head in one.

Axes: N batch, H, W, C channels, R reduced features, K buckets.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax.nn import dense


class DoubleHeadedGate(nnx.Module):
  """One shared reduction, then an attention head and, in one block, a slimmer.

    r = relu(mean(x) @ W1[:c] + b1)
    attention(x) = x * sigmoid(r @ W2[:, :c] + b2[:c])
    logits(x) = r @ W3

  (DS-Net++, section 3.3; DS-Net, section 3.4.)
  """

  def __init__(
    self,
    features: int,
    num_buckets: int | None = None,
    *,
    reduced: int | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the heads.

    Args:
      features: C, the widest input.
      num_buckets: K, the slimming head's outputs; None leaves it out.
      reduced: R; None means `reduced_width(features)`.
      rngs: the stream `params` initialises the kernels.
    """
    reduced = reduced or reduced_width(features)
    self.reduce = dense.SlicedDense(features, reduced, rngs=rngs)
    self.expand = dense.SlicedDense(reduced, features, rngs=rngs)
    self.slim = (
      _slimming_head(reduced, num_buckets, rngs) if num_buckets else None
    )

  def reduced(self, x: jax.Array) -> jax.Array:
    """Returns the shared reduction (N, R) of x (N, H, W, c), in float32."""
    pooled = x.astype(jnp.float32).mean((1, 2))
    return jax.nn.relu(self.reduce(pooled))

  def attention(self, x: jax.Array) -> jax.Array:
    """Scales the channels of x (N, H, W, c) by their attention."""
    logits = self.expand(self.reduced(x), x.shape[-1])
    scale = jax.nn.sigmoid(logits).astype(x.dtype)
    return x * scale[:, None, None, :]

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns the slimming head's logits (N, K), float32."""
    return self.slim(self.reduced(x))


def _slimming_head(reduced, num_buckets, rngs) -> dense.SlicedDense:
  head = dense.SlicedDense(reduced, num_buckets, use_bias=False, rngs=rngs)
  # Every bucket equally likely until the gate is trained.
  head.kernel[...] = jnp.zeros((reduced, num_buckets))
  return head


def reduced_width(features: int) -> int:
  """Returns R as published: a quarter of the full width."""
  return features // 4
