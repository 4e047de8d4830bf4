"""Tests of the sliced dense layer against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from ds_jax import nn


def make_layer(**options):
  """A 4 -> 6 layer whose bias is not zero."""
  layer = nn.SlicedDense(4, 6, rngs=nnx.Rngs(0), **options)
  if layer.bias is not None:
    layer.bias[...] = jnp.arange(1.0, 7.0)
  return layer


def make_input(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class SlicedDenseTest(parameterized.TestCase):
  @parameterized.product(
    widths=((4, 6), (3, 2), (1, 6), (4, 1)), leading=((5,), (2, 3, 2), ())
  )
  def test_slice_equals_a_layer_of_that_width(self, widths, leading):
    width_in, width = widths
    layer = make_layer()
    x = make_input(*leading, width_in)
    kernel = np.asarray(layer.kernel[...])[:width_in, :width]
    bias = np.arange(1.0, 7.0)[:width]
    found = layer(x, width)
    assert found.shape == (*leading, width)
    np.testing.assert_allclose(found, x @ kernel + bias, rtol=1e-5)

  def test_no_bias_means_the_product_alone(self):
    layer = make_layer(use_bias=False)
    x = make_input(5, 3)
    kernel = np.asarray(layer.kernel[...])[:3, :2]
    np.testing.assert_allclose(layer(x, 2), x @ kernel, rtol=1e-5, atol=1e-6)
    assert layer.bias is None

  def test_no_width_means_the_full_one(self):
    layer = make_layer()
    x = make_input(5, 3)
    np.testing.assert_array_equal(layer(x), layer(x, 6))

  def test_gradient_stays_inside_the_slice(self):
    graph, params = nnx.split(make_layer())

    def loss(params):
      return (nnx.merge(graph, params)(make_input(5, 3), 2) ** 2).sum()

    gradient = jax.grad(loss)(params)
    kernel, bias = (np.asarray(gradient[n][...]) for n in ('kernel', 'bias'))
    assert (kernel[:3, :2] != 0).all() and (bias[:2] != 0).all()
    assert (kernel[3:] == 0).all() and (kernel[:, 2:] == 0).all()
    assert (bias[2:] == 0).all()

  def test_bfloat16_input_gives_bfloat16(self):
    layer = make_layer()
    x = make_input(5, 4)
    y = layer(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and layer.kernel.dtype == jnp.float32
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(
      np.asarray(y, np.float32), layer(x), rtol=2**-7, atol=2**-6
    )

  @parameterized.parameters((4, 7), (5, 6))
  def test_too_wide_a_slice_is_refused(self, width_in, width):
    with pytest.raises(ValueError, match=f'Slice {width_in} -> {width} does'):
      make_layer()(make_input(1, width_in), width)
