"""Tests of the sliced norms against NumPy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from ds_jax import nn

ROWS, WIDTH = 3, 5
EPSILON = 1e-5
# The variance is a difference of two float32 means.
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def make_norm():
  """A norm in which no two numbers are alike."""
  rng = np.random.default_rng(0)
  norm = nn.SlicedBatchNorm(WIDTH, ROWS)
  norm.scale[...] = jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32)
  norm.bias[...] = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
  norm.mean[...] = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
  norm.variance[...] = jnp.asarray(
    rng.uniform(0.5, 2, (ROWS, WIDTH)), jnp.float32
  )
  return norm


def make_input(*shape):
  x = np.random.default_rng(1).normal(1.0, 2.0, shape)
  return x.astype(np.float32)


def arrays_of(norm):
  names = ('scale', 'bias', 'mean', 'variance')
  return {n: np.array(getattr(norm, n)[...], np.float64) for n in names}


def normalize(x, mean, variance, arrays):
  """The formula in float64, at x's width."""
  width = x.shape[-1]
  unit = (x.astype(np.float64) - mean) / np.sqrt(variance + EPSILON)
  return unit * arrays['scale'][:width] + arrays['bias'][:width]


class SlicedBatchNormTest(parameterized.TestCase):
  @parameterized.product(row=(0, 1, 2), width=(1, 3, 5))
  def test_inference_uses_the_row_and_the_slice(self, row, width):
    norm = make_norm()
    before = arrays_of(norm)
    x = make_input(2, 3, 4, width)
    mean, variance = (before[n][row, :width] for n in ('mean', 'variance'))
    expected = normalize(x, mean, variance, before)
    np.testing.assert_allclose(norm(x, row), expected, **TOLERANCE)
    for name, array in arrays_of(norm).items():
      np.testing.assert_array_equal(array, before[name])

  @parameterized.product(
    kind=('conv', 'pointwise', 'depthwise', 'dense'),
    width=(3, 5),
    momentum=(None, 0.1),
    backend=('cpu', 'gpu'),
  )
  def test_after_a_layer_is_the_layer_and_the_norm(
    self, kind, width, momentum, backend
  ):
    rngs = nnx.Rngs(0)
    layer, size = {
      'conv': (nn.SlicedConv(4, WIDTH, 3, rngs=rngs), width),
      'pointwise': (nn.SlicedConv(4, WIDTH, 1, stride=2, rngs=rngs), width),
      'depthwise': (nn.SlicedDepthwiseConv(WIDTH, 5, rngs=rngs), 3),
      'dense': (nn.SlicedDense(4, WIDTH, use_bias=False, rngs=rngs), width),
    }[kind]
    x = make_input(2, 6, 5, width if kind == 'depthwise' else 4)
    norm, other = make_norm(), make_norm()
    if momentum is None:
      arrays = arrays_of(norm)
      mean, variance = (arrays[n][1, :width] for n in ('mean', 'variance'))
      expected = normalize(np.array(layer(x, size)), mean, variance, arrays)
    else:
      expected = other(layer(x, size), 1, momentum)
    with mock.patch.object(jax, 'default_backend', lambda: backend):
      found = norm.after(layer, x, size, 1, momentum)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for name, array in arrays_of(norm).items():
      np.testing.assert_array_equal(array, arrays_of(other)[name])

  def test_elsewhere_than_on_cpu_kernels_are_scaled(self):
    layer = nn.SlicedConv(4, WIDTH, 3, rngs=nnx.Rngs(0))
    x = make_input(2, 6, 5, 4)

    def products(backend):
      def run(x):
        with mock.patch.object(jax, 'default_backend', lambda: backend):
          return make_norm().after(layer, x, WIDTH, 0)

      equations = jax.make_jaxpr(run)(x).eqns
      return [
        e.outvars[0].aval.shape
        for e in equations
        if e.primitive.name == 'mul' and e.outvars[0].aval.ndim == 4
      ]

    assert products('cpu') == [(2, 6, 5, WIDTH)]
    assert products('gpu') == [(3, 3, 4, WIDTH)]

  @mock.patch.object(jax, 'default_backend', lambda: 'gpu')
  def test_after_a_bfloat16_layer_is_bfloat16(self):
    layer = nn.SlicedConv(4, WIDTH, 3, rngs=nnx.Rngs(0))
    x = jnp.asarray(make_input(2, 6, 5, 4), jnp.bfloat16)
    found = make_norm().after(layer, x, 3, 0)
    assert found.dtype == jnp.bfloat16
    expected = make_norm()(layer(x.astype(jnp.float32), 3), 0)
    # A few roundings to 8 bits of numbers of about 5.
    np.testing.assert_allclose(
      found.astype(np.float32), expected, rtol=2e-2, atol=5e-2
    )

  @parameterized.product(width=(1, 3, 5), shape=((2, 3, 4), (7,)))
  def test_training_normalises_with_the_batch(self, width, shape):
    norm = make_norm()
    x = make_input(*shape, width)
    axes = tuple(range(len(shape)))
    expected = normalize(
      x, x.mean(axes), x.astype(np.float64).var(axes), arrays_of(norm)
    )
    np.testing.assert_allclose(norm(x, 1, 0.1), expected, **TOLERANCE)

  @parameterized.product(
    row=(0, 2), width=(3, 5), momentum=(0.1, 1.0, np.float32(0.25))
  )
  def test_running_statistics_move_in_the_row_and_slice_alone(
    self, row, width, momentum
  ):
    norm = make_norm()
    expected = arrays_of(norm)
    x = make_input(2, 3, 4, width)
    norm(x, row, momentum)
    batch = {
      'mean': x.astype(np.float64).mean((0, 1, 2)),
      # As in PyTorch: over the count less one.
      'variance': x.astype(np.float64).var((0, 1, 2), ddof=1),
    }
    found = arrays_of(norm)
    for name, value in batch.items():
      old = expected[name][row, :width].copy()
      expected[name][row, :width] = (1 - momentum) * old + momentum * value
      np.testing.assert_allclose(found[name], expected[name], **TOLERANCE)
      untouched = np.ones((ROWS, WIDTH), bool)
      untouched[row, :width] = False
      np.testing.assert_array_equal(
        found[name][untouched], expected[name][untouched]
      )

  def test_one_value_a_channel_keeps_its_variance_finite(self):
    norm = make_norm()
    norm(make_input(1, WIDTH), 0, 1.0)
    np.testing.assert_array_equal(norm.variance[0], np.zeros(WIDTH))

  @parameterized.parameters(
    ((64, WIDTH),), ((4, 9, WIDTH),), ((2, 8, 6, WIDTH),)
  )
  def test_large_means_lose_no_variance(self, shape):
    norm = make_norm()
    noise = np.random.default_rng(3).normal(0.0, 0.1, shape)
    x = (1000 + noise).astype(np.float32)
    axes = tuple(range(len(shape) - 1))
    values = x.astype(np.float64)
    mean, variance = values.mean(axes), values.var(axes)
    arrays = arrays_of(norm)
    found = norm(x, 0, 1.0)
    np.testing.assert_allclose(norm.mean[0], mean, rtol=1e-7)
    unbiased = values.var(axes, ddof=1)
    np.testing.assert_allclose(norm.variance[0], unbiased, rtol=1e-5)
    # Numbers of ten thousand are subtracted; a float32 there is rounded to
    # 1 / 1,024.
    expected = normalize(x, mean, variance, arrays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)

  def test_a_middle_that_is_unlike_the_rest_costs_no_variance(self):
    x = (1000 + make_input(8, 5, 5, WIDTH) / 20).astype(np.float32)
    x[:, 2, 2] = 0.0
    norm = make_norm()
    norm(x, 0, 1.0)
    expected = x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.variance[0], expected, rtol=1e-4)

  def test_gradient_at_a_large_mean_is_that_of_the_formula(self):
    graph, params, stats = nnx.split(make_norm(), nnx.Param, nnx.BatchStat)
    noise = np.random.default_rng(3).normal(0.0, 0.1, (4, 3, 2, WIDTH))
    x = (1000 + noise).astype(np.float32)
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def loss(x):
      norm = nnx.merge(graph, params, stats, copy=True)
      return (norm(x, 1, 0.1) * dy).sum()

    # As of the layer norm, over the other axes.
    values = x.astype(np.float64)
    deviation = np.sqrt(values.var((0, 1, 2)) + EPSILON)
    unit = (values - values.mean((0, 1, 2))) / deviation
    g = dy * np.asarray(params['scale'][...], np.float64)
    mean, product = (v.mean((0, 1, 2)) for v in (g, g * unit))
    expected = (g - mean - unit * product) / deviation
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      jax.grad(loss)(x), expected, rtol=0, atol=2e-3 * scale
    )

  def test_gradient_is_that_of_the_formula(self):
    graph, params, stats = nnx.split(make_norm(), nnx.Param, nnx.BatchStat)
    x = make_input(2, 3, 4, 3)
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def ours(x, params):
      norm = nnx.merge(graph, params, stats, copy=True)
      return (norm(x, 1, 0.1) * dy).sum()

    def plain(x, scale, bias):
      mean = x.mean((0, 1, 2), keepdims=True)
      variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
      y = (x - mean) / jnp.sqrt(variance + EPSILON)
      scale, bias = (v.reshape(1, 1, 1, -1) for v in (scale, bias))
      return ((y * scale + bias) * dy).sum()

    dx, dparams = jax.grad(ours, argnums=(0, 1))(x, params)
    scale, bias = (params[n][...][:3] for n in ('scale', 'bias'))
    expected = jax.grad(plain, argnums=(0, 1, 2))(x, scale, bias)
    np.testing.assert_allclose(dx, expected[0], rtol=1e-4, atol=1e-5)
    for name, value in zip(('scale', 'bias'), expected[1:], strict=True):
      gradient = np.asarray(dparams[name][...])
      np.testing.assert_allclose(gradient[:3], value, rtol=1e-4, atol=1e-5)
      assert (gradient[3:] == 0).all()

  @parameterized.parameters(None, 1.0)
  def test_bfloat16_is_computed_in_float32(self, momentum):
    norm = make_norm()
    arrays = arrays_of(norm)
    # A mean of 2,048 values cannot be summed in bfloat16.
    x = jnp.asarray(make_input(8, 16, 16, WIDTH), jnp.bfloat16)
    y = norm(x, 0, momentum)
    assert y.dtype == jnp.bfloat16
    assert norm.mean.dtype == norm.variance.dtype == jnp.float32
    values = np.asarray(x, np.float64)
    if momentum is None:
      mean, variance = arrays['mean'][0], arrays['variance'][0]
    else:
      mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))
      unbiased = values.var((0, 1, 2), ddof=1)
      np.testing.assert_allclose(norm.mean[0], mean, rtol=1e-5)
      np.testing.assert_allclose(norm.variance[0], unbiased, rtol=1e-5)
    expected = normalize(values, mean, variance, arrays)
    # One rounding to 8 bits, at the end.
    np.testing.assert_allclose(
      np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5
    )

  @parameterized.parameters((6, 0), (5, 3), (5, -1))
  def test_misfits_are_refused(self, width, row):
    with pytest.raises(ValueError, match=f'{width} channels, row {row}, does'):
      make_norm()(make_input(2, width), row)

  @mock.patch.object(jax, 'default_backend', lambda: 'gpu')
  def test_rows_that_do_not_exist_are_refused_after_a_layer(self):
    layer = nn.SlicedConv(4, WIDTH, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='5 channels, row 3, does not fit'):
      make_norm().after(layer, make_input(2, 6, 5, 4), None, 3)


def make_layer_norm():
  rng = np.random.default_rng(0)
  norm = nn.SlicedLayerNorm(WIDTH)
  norm.scale[...] = jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32)
  norm.bias[...] = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
  arrays = {
    n: np.array(getattr(norm, n)[...], np.float64) for n in ('scale', 'bias')
  }
  return norm, arrays


def layer_normalize(x, arrays):
  """The formula in float64, over x's width, and what it divides by."""
  width, x = x.shape[-1], np.asarray(x, np.float64)
  deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  unit = (x - x.mean(-1, keepdims=True)) / deviation
  return unit * arrays['scale'][:width] + arrays['bias'][:width]


class SlicedLayerNormTest(parameterized.TestCase):
  @parameterized.product(width=(2, 3, 5), shape=((2, 3), (7,), (2, 3, 4)))
  def test_slice_normalises_itself_alone(self, width, shape):
    norm, arrays = make_layer_norm()
    x = make_input(*shape, width)
    expected = layer_normalize(x, arrays)
    np.testing.assert_allclose(norm(x), expected, **TOLERANCE)

  def test_rows_of_one_value_give_the_bias(self):
    norm, arrays = make_layer_norm()
    found = norm(np.full((2, 4), 3, np.float32))
    np.testing.assert_allclose(found, [arrays['bias'][:4]] * 2, rtol=1e-6)

  def test_large_means_lose_no_variance(self):
    norm, arrays = make_layer_norm()
    # A float32 near 1,000 is rounded to 1 / 16,384, and so is the mean.
    x = make_input(4, WIDTH) + np.float32(1000)
    expected = layer_normalize(x, arrays)
    np.testing.assert_allclose(norm(x), expected, rtol=0, atol=2e-4)

  @parameterized.parameters(2, 3, 5)
  def test_gradient_is_that_of_the_formula(self, width):
    norm, arrays = make_layer_norm()
    graph, params = nnx.split(norm)
    x = make_input(4, width)
    dy = np.random.default_rng(2).normal(size=x.shape)

    def loss(x, params):
      return (nnx.merge(graph, params)(x) * dy.astype(np.float32)).sum()

    dx, dparams = jax.grad(loss, argnums=(0, 1))(x, params)
    # With u the unit values and g the gradient to them, the gradient to x is
    # (g - mean(g) - u * mean(g * u)) / deviation.
    deviation = np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-6)
    unit = (x - x.astype(np.float64).mean(-1, keepdims=True)) / deviation
    g = dy * arrays['scale'][:width]
    mean, product = (v.mean(-1, keepdims=True) for v in (g, g * unit))
    expected = (g - mean - unit * product) / deviation
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=2e-6)
    for name, value in (('scale', dy * unit), ('bias', dy)):
      gradient = np.asarray(dparams[name][...])
      np.testing.assert_allclose(gradient[:width], value.sum(0), rtol=1e-5)
      assert (gradient[width:] == 0).all()

  def test_bfloat16_is_computed_in_float32(self):
    norm, arrays = make_layer_norm()
    x = jnp.asarray(make_input(8, WIDTH), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16 and norm.scale.dtype == jnp.float32
    # One rounding to 8 bits, at the end.
    np.testing.assert_allclose(
      np.asarray(y, np.float64),
      layer_normalize(np.asarray(x, np.float64), arrays),
      rtol=2**-8,
      atol=1e-5,
    )

  def test_fresh_norm_is_the_plain_one(self):
    norm = nn.SlicedLayerNorm(WIDTH)
    x = make_input(4, 3)
    expected = layer_normalize(x, {'scale': np.ones(5), 'bias': np.zeros(5)})
    np.testing.assert_allclose(norm(x), expected, **TOLERANCE)

  def test_wider_input_is_refused(self):
    norm, _ = make_layer_norm()
    with pytest.raises(ValueError, match='6 channels does not fit a layer'):
      norm(make_input(2, 6))
