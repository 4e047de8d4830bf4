"""Gates: channel attention and slimming head in one, or slimming alone.

Axes: N batch, H, W, T tokens, C channels, R reduced features, K buckets.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import validation
from ds_jax.nn import dense, norm

_POOLINGS = ('mean', 'mean_max_std')


def _one_plus_tanh(x: jax.Array) -> jax.Array:
  return 1 + jnp.tanh(x)


_ACTIVATIONS = {'sigmoid': jax.nn.sigmoid, 'one_plus_tanh': _one_plus_tanh}


class DoubleHeadedGate(nnx.Module):
  """One shared reduction, then an attention head and, in one block, a slimmer.

    r = relu(mean(x) @ W1[:c] + b1)
    attention(x) = x * act(r @ W2[:, :c] + b2[:c])
    logits(x) = r @ W3

  (DS-Net++, section 3.3; DS-Net, section 3.4.) `act` is the sigmoid, or `1 +
  tanh` with W2 zero at the start: the identity, so that weights trained
  without attention still fit.
  """

  def __init__(
    self,
    features: int,
    num_buckets: int | None = None,
    *,
    reduced: int | None = None,
    activation: str = 'sigmoid',
    rngs: nnx.Rngs,
  ):
    """Makes the heads.

    Args:
      features: C, the widest input.
      num_buckets: K, the slimming head's outputs; None leaves it out.
      reduced: R; None means `reduced_width(features)`.
      activation: of the attention, `sigmoid` or `one_plus_tanh`.
      rngs: the stream `params` initialises the kernels.
    """
    reduced = reduced or reduced_width(features)
    self.reduce = dense.SlicedDense(features, reduced, rngs=rngs)
    self.expand = dense.SlicedDense(reduced, features, rngs=rngs)
    self._activation = _ACTIVATIONS[activation]
    if activation == 'one_plus_tanh':
      self.expand.kernel[...] = jnp.zeros((reduced, features))
    self.slim = (
      _slimming_head(reduced, num_buckets, rngs) if num_buckets else None
    )

  def reduced(self, x: jax.Array) -> jax.Array:
    """Returns the shared reduction (N, R) of x (N, H, W, c), in float32."""
    pooled = mean_of_pixels(x.astype(jnp.float32))
    return jax.nn.relu(self.reduce(pooled))

  def attention(self, x: jax.Array) -> jax.Array:
    """Scales the channels of x (N, H, W, c) by their attention."""
    logits = self.expand(self.reduced(x), x.shape[-1])
    scale = self._activation(logits).astype(x.dtype)
    return x * scale[:, None, None, :]

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns the slimming head's logits (N, K), float32."""
    return self.slim(self.reduced(x))


def mean_of_pixels(x: jax.Array) -> jax.Array:
  """Returns the mean (N, C) of x (N, H, W, C), fast on every platform.

  On CPU it is a product with 1 / (H W), since XLA's sums take longer (and err
  less, by 1e-7 instead of 2e-6 of 56 x 56 pixels). Elsewhere a sum is part of
  the kernel that makes x.
  """
  return jax.lax.platform_dependent(
    x, cpu=_mean_by_product, default=lambda x: x.mean((1, 2))
  )


def _mean_by_product(x):
  batch, height, width, channels = x.shape
  shares = jnp.full((batch, 1, height * width), 1 / (height * width), x.dtype)
  x = x.reshape(batch, height * width, channels)
  return jnp.matmul(shares, x)[:, 0]


def _slimming_head(reduced, num_buckets, rngs) -> dense.SlicedDense:
  head = dense.SlicedDense(reduced, num_buckets, use_bias=False, rngs=rngs)
  # Every bucket equally likely until the gate is trained.
  head.kernel[...] = jnp.zeros((reduced, num_buckets))
  return head


def reduced_width(features: int) -> int:
  """Returns R as published: a quarter of the full width."""
  return features // 4


class SlimmingGate(nnx.Module):
  """A gate without attention, with layers of its own, for Stage II alone.

    logits(x) = mlp(batch_norm(pool(x)))

  It reads the trunk at its narrowest slices, so nothing in it is sliced. Stage
  II trains all of it; the published gate's reduction is the attention head's,
  which Stage I has trained for another end. Calibration sets the norm's
  statistics, without which the channels of the largest scale drown the rest.
  """

  def __init__(
    self,
    features: int,
    num_buckets: int,
    *,
    hidden: Sequence[int],
    pooling: str,
    rngs: nnx.Rngs,
  ):
    """Makes the layers.

    Args:
      features: C, of the narrowest trunk.
      num_buckets: K.
      hidden: units of each hidden layer; none makes the head linear.
      pooling: `mean`, or `mean_max_std`, which takes all three.
      rngs: the stream `params` initialises the kernels.

    Raises:
      ValueError: for another `pooling`, or a layer without units.
    """
    validation.check_choice('gate_pooling', pooling, _POOLINGS)
    for units in hidden:
      validation.check_range('gate_hidden', units, low=1)
    self._pooling = pooling
    sizes = [features * len(pooling.split('_')), *hidden]
    self.norm = norm.SlicedBatchNorm(sizes[0], num_rows=1)
    self.hidden = nnx.List(
      [
        dense.SlicedDense(width_in, width, rngs=rngs)
        for width_in, width in itertools.pairwise(sizes)
      ]
    )
    self.head = _slimming_head(sizes[-1], num_buckets, rngs)

  def __call__(
    self, x: jax.Array, momentum: float | jax.Array | None = None
  ) -> jax.Array:
    """Returns logits (N, K) of x (N, H, W, C) or (N, T, C), float32.

    Args:
      x: the trunk's features.
      momentum: of the norm's statistics; see `SlicedBatchNorm`.
    """
    x = self.norm(self._pool(x), row=0, momentum=momentum)
    for layer in self.hidden:
      x = jax.nn.relu(layer(x))
    return self.head(x)

  def _pool(self, x):
    x = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    mean = x.mean(1)
    if self._pooling == 'mean':
      return mean
    # A variance of zero has a square root without a gradient.
    deviation = jnp.sqrt(x.var(1) + 1e-6)
    return jnp.concatenate([mean, x.max(1), deviation], axis=-1)
