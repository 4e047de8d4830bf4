"""Activations whose gradient reads as little memory as it can."""

import jax

from ds_jax.nn import fusion


@jax.custom_vjp
def swish(x: jax.Array) -> jax.Array:
  """`x * sigmoid(x)` of any shape; the gradient computes the sigmoid again.

  Autodiff keeps the sigmoid of the forward pass: an array more to write and to
  read, where memory is what a training step waits for.
  """
  return x * jax.nn.sigmoid(x)


def _swish_forward(x):
  return swish(x), x


def _swish_backward(x, dy):
  # Without this the compiler finds the forward pass's sigmoid, and keeps it.
  sigmoid = jax.nn.sigmoid(fusion.as_it_is(x))
  return (dy * (sigmoid + x * sigmoid * (1 - sigmoid)),)


swish.defvjp(_swish_forward, _swish_backward)
