"""Norms for sliced networks: shared affine, sliced like every weight.

Axes: N batch, H, W, C channels, R rows of statistics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax.nn import dense


class SlicedBatchNorm(nnx.Module):
  """Normalises with the affine's leading slice and one row of statistics.

  The same weights see other activations in each sub-network, so each keeps
  running statistics of its own (switchable batch norm), one row apiece; scale
  and bias are shared and sliced like every weight.
  """

  def __init__(self, features: int, num_rows: int, *, epsilon: float = 1e-5):
    """Makes scale and bias (C,), running mean and variance (R, C).

    Args:
      features: C, the widest input.
      num_rows: R, how many sub-networks tell their statistics apart here.
      epsilon: added to the variance.
    """
    self.scale = nnx.Param(jnp.ones((features,)))
    self.bias = nnx.Param(jnp.zeros((features,)))
    self.mean = nnx.BatchStat(jnp.zeros((num_rows, features)))
    self.variance = nnx.BatchStat(jnp.ones((num_rows, features)))
    self.epsilon = epsilon

  def __call__(
    self,
    x: jax.Array,
    row: int,
    momentum: float | jax.Array | None = None,
  ) -> jax.Array:
    """Normalises x over all axes but the last.

    Args:
      x: (..., c) with c <= C.
      row: which statistics, static.
      momentum: None normalises with the running statistics. A number m
        normalises with the batch's and moves the running ones towards them:
        `running += m * (batch - running)`. The running variance is the
        unbiased one, as in PyTorch.

    Returns:
      Same shape and dtype as x; the arithmetic is float32.

    Raises:
      ValueError: if x is wider than the parameters or the row does not exist.
    """
    width = x.shape[-1]
    self._check(width, row)
    if momentum is None:
      mean, variance = self.mean[row, :width], self.variance[row, :width]
    else:
      mean, variance = _moments(x)
      count = x.size // width
      unbiased = variance * (count / max(count - 1, 1))
      self._move(self.mean, row, mean, momentum)
      self._move(self.variance, row, unbiased, momentum)
    scale, shift = self._affine(mean, variance)
    y = x.astype(jnp.float32) * _over_channels(scale, x)
    return (y + _over_channels(shift, x)).astype(x.dtype)

  def after(
    self,
    layer: Callable[..., jax.Array],
    x: jax.Array,
    size: int | None,
    row: int,
    momentum: float | jax.Array | None = None,
  ) -> jax.Array:
    """`self(layer(x, size), row, momentum)`, for less on accelerators.

    Running statistics make the norm a scale and a shift. There the scale goes
    into the layer's kernel, once for all calls where weights are prepared, and
    the shift is a bias, which cuDNN adds in its convolution. On CPU both are
    part of the pass over memory that comes next, and cost nothing, but a scaled
    slice of a kernel takes longer to make than a slice.

    Args:
      layer: without a bias; called as `layer(x, size, scale)`.
      x: as of the layer.
      size: as of the layer.
      row: as of a call.
      momentum: as of a call.
    """
    if momentum is not None or jax.default_backend() == 'cpu':
      return self(layer(x, size), row, momentum)
    scale, shift = self._affine(self.mean[row], self.variance[row])
    y = layer(x, size, scale)
    self._check(y.shape[-1], row)
    return dense.shifted(y, shift)

  def _check(self, width, row):
    num_rows, full_width = self.mean.shape
    if width > full_width or not 0 <= row < num_rows:
      raise ValueError(
        f'Slice of {width} channels, row {row}, does not fit a batch norm of'
        f' {full_width} channels and {num_rows} rows.'
      )

  def _affine(self, mean, variance):
    """Returns scale and shift (c,)."""
    width = len(mean)
    scale = self.scale[:width] * jax.lax.rsqrt(variance + self.epsilon)
    return scale, self.bias[:width] - mean * scale

  def _move(self, running, row, batch, momentum):
    width = batch.shape[0]
    batch = jax.lax.stop_gradient(batch)
    old = running[row, :width]
    new = old + momentum * (batch - old)
    running[...] = running[...].at[row, :width].set(new)


class SlicedLayerNorm(nnx.Module):
  """Normalises over the active slice, with the affine's leading slice."""

  def __init__(self, features: int, *, epsilon: float = 1e-6):
    """Makes scale and bias (C,).

    Args:
      features: C, the widest input.
      epsilon: added to the variance.
    """
    self.scale = nnx.Param(jnp.ones((features,)))
    self.bias = nnx.Param(jnp.zeros((features,)))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises each row of x (..., c), c <= C.

    Returns:
      Same shape and dtype as x; the arithmetic is float32.

    Raises:
      ValueError: if x is wider than the parameters.
    """
    width = x.shape[-1]
    if width > self.scale.shape[0]:
      raise ValueError(
        f'Slice of {width} channels does not fit a layer norm of'
        f' {self.scale.shape[0]}.'
      )
    scale, bias = self.scale[:width], self.bias[:width]
    y = x.astype(jnp.float32)
    # Not the default, a difference of two means, which a large mean cancels.
    variance = y.var(-1, keepdims=True)
    y = jax.nn.standardize(y, variance=variance, epsilon=self.epsilon)
    shape = (1,) * (x.ndim - 1) + (width,)
    return (y * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


@jax.custom_vjp
def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance per channel, of x (N, ..., c)."""
  x = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - 1))
  # E[x^2] - E[x]^2 cancels where the mean is far from zero, but not about a
  # shift that is near it. A pixel of each image is near enough: of P pixels an
  # image it is off by sqrt(P) standard deviations at most. Both sums still need
  # nothing but x, and so are made in one reading of it where XLA can.
  middle = x[(slice(None), *(size // 2 for size in x.shape[1:-1]))]
  shift = middle.mean(0)
  shifted = x - _over_channels(shift, x)
  mean = shifted.mean(axes)
  variance = jnp.square(shifted).mean(axes) - jnp.square(mean)
  return shift + mean, jnp.maximum(variance, 0.0)


def _moments_forward(x):
  mean, variance = _moments(x)
  return (mean, variance), (x, mean)


def _moments_backward(saved, gradients):
  """The derivative of a variance, where the shift plays no part."""
  x, mean = saved
  share = x.shape[-1] / x.size
  to_mean, to_variance = (_over_channels(share * g, x) for g in gradients)
  to_x = to_mean + 2 * to_variance * (x - _over_channels(mean, x))
  return (to_x.astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


def _over_channels(vector, x):
  """Returns a vector (c,) in a shape that goes with x (..., c)."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))
