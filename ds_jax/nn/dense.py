"""A dense layer whose narrower versions are leading slices of its kernel.

Axes: N batch, I input features, O output features. Applied to NHWC images it
is a 1 x 1 convolution.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class SlicedDense(nnx.Module):
  """`y = x @ kernel[:i, :o] + bias[:o]`; i is read off x, o is chosen.

  Narrower slices are prefixes of wider ones, so widening from o to o' keeps
  the first o outputs and adds the rest: nested residual learning (DS-Net++,
  section 3.1).
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    use_bias: bool = True,
    rngs: nnx.Rngs,
  ):
    """Makes the full-size parameters.

    Args:
      in_features: I, the widest input.
      features: O, the widest output.
      use_bias: whether there is a bias.
      rngs: the stream `params` initialises the kernel.
    """
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (in_features, features)))
    self.bias = nnx.Param(jnp.zeros((features,))) if use_bias else None

  def __call__(
    self,
    x: jax.Array,
    features: int | None = None,
    scale: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the slice that takes x's width to `features`.

    Args:
      x: (..., i) with i <= I.
      features: o, static; None means O.
      scale: (O,), of the outputs before the bias.

    Returns:
      (..., o), in x's dtype.

    Raises:
      ValueError: if i or o is wider than the parameters.
    """
    full_in, full_out = self.kernel.shape
    width = full_out if features is None else features
    if x.shape[-1] > full_in or width > full_out:
      raise ValueError(
        f'Slice {x.shape[-1]} -> {width} does not fit a dense layer of'
        f' {full_in} -> {full_out}.'
      )
    kernel = scaled(self.kernel[: x.shape[-1], :width], scale)
    y = matmul(x, kernel.astype(x.dtype))
    return y if self.bias is None else shifted(y, self.bias)


def scaled(kernel: jax.Array, scale: jax.Array | None) -> jax.Array:
  """Returns a kernel (..., o) times the leading slice of scale (O,), if any."""
  return kernel if scale is None else kernel * _leading(scale, kernel)


def shifted(y: jax.Array, shift: jax.Array) -> jax.Array:
  """Returns y (..., o) plus the leading slice of shift (O,), in y's dtype."""
  return y + _leading(shift, y).astype(y.dtype)


def _leading(vector, like):
  width = like.shape[-1]
  # Of as many axes, so that nothing is broadcast before it is used.
  return vector[:width].reshape((1,) * (like.ndim - 1) + (width,))


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`x @ kernel` of (..., I) and (I, O).

  Autodiff takes the kernel's gradient as (O, I) and transposes it, which
  XLA:CPU turns into a transposed copy of all of dy before the product.
  """
  return x @ kernel


def _matmul_forward(x, kernel):
  return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, dy):
  x, kernel = residuals
  rows = [a.reshape(-1, a.shape[-1]) for a in (x, dy)]
  dkernel = jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))
  return dy @ kernel.T, dkernel


matmul.defvjp(_matmul_forward, _matmul_backward)
