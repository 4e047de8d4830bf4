"""Tests of the sliced convolutions against loops in NumPy and native XLA."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from ds_jax import nn
from ds_jax.nn import conv

# (kernel size, stride, height, width): odd and even sides, never square.
SHAPES = [
  (kernel_size, stride, *sides)
  for kernel_size, stride, sides in itertools.product(
    (3, 5), (1, 2), ((7, 9), (8, 6), (5, 8))
  )
]


def make_input(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def windows(x, size, stride):
  """Yields each output pixel and the (N, k, k, i) input under it, float64."""
  pad = size // 2
  padded = np.pad(
    x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0))
  )
  for row in range(-(-x.shape[1] // stride)):
    for column in range(-(-x.shape[2] // stride)):
      top, left = row * stride, column * stride
      yield (
        (slice(None), row, column),
        padded[:, top : top + size, left : left + size],
      )


def numpy_conv(x, kernel, stride):
  size, _, _, width = kernel.shape
  sides = [-(-side // stride) for side in x.shape[1:3]]
  y = np.full((len(x), *sides, width), np.nan)
  for pixel, window in windows(x, size, stride):
    y[pixel] = np.einsum('nabi,abio->no', window, kernel)
  return y


def numpy_depthwise_conv(x, kernel, stride):
  sides = [-(-side // stride) for side in x.shape[1:3]]
  y = np.full((len(x), *sides, x.shape[-1]), np.nan)
  for pixel, window in windows(x, kernel.shape[0], stride):
    y[pixel] = np.einsum('nabc,abc->nc', window, kernel[:, :, 0])
  return y


def gradients(function, x, kernel, stride, seed=2):
  """The gradients to x and the kernel of a random combination of outputs."""
  shape = jax.eval_shape(lambda: function(x, kernel, stride)).shape
  dy = make_input(*shape, seed=seed)
  dy = jnp.asarray(dy, x.dtype)
  return jax.jit(
    jax.grad(
      lambda x, kernel: (function(x, kernel, stride) * dy).sum(),
      argnums=(0, 1),
    )
  )(x, kernel)


def assert_close(found, expected, tolerance):
  """Compares to the largest magnitude: sums of both signs may cancel."""
  found, expected = (np.asarray(v, np.float64) for v in (found, expected))
  assert found.shape == expected.shape
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


# Sums of at most 5 * 5 * 8 float32 products, each rounded at 6e-8, in an order
# of XLA's choice.
FLOAT32 = 2e-6
# One rounding to 8 bits, and a few more within the sum.
BFLOAT16 = 2e-2


class SlicedConvTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product((1, 3), (1, 2), ((4, 6), (3, 2), (1, 6), (4, 1)))
  )
  def test_slice_equals_a_convolution_of_that_width(
    self, kernel_size, stride, widths
  ):
    layer = nn.SlicedConv(4, 6, kernel_size, stride=stride, rngs=nnx.Rngs(0))
    width_in, width = widths
    x = make_input(2, 7, 6, width_in)
    kernel = np.array(layer.kernel[...])[:, :, :width_in, :width]
    assert_close(layer(x, width), numpy_conv(x, kernel, stride), FLOAT32)

  @parameterized.parameters(
    *itertools.product((3, 5, 7), (1, 2, 3), ((7, 9), (8, 6), (3, 4)))
  )
  def test_patches_equal_numpy(self, kernel_size, stride, sides):
    x = make_input(2, *sides, 3)
    kernel = make_input(kernel_size, kernel_size, 3, 4, seed=1)
    y = jax.jit(conv.patches_conv, static_argnums=2)(x, kernel, stride)
    assert_close(y, numpy_conv(x, kernel, stride), FLOAT32)

  def test_no_images_and_any_number_of_them(self):
    layer = nn.SlicedConv(3, 4, 3, stride=2, rngs=nnx.Rngs(0))
    assert jax.jit(layer)(make_input(0, 7, 6, 3)).shape == (0, 4, 3, 4)
    (batch,) = jax.export.symbolic_shape('n')
    images = jax.ShapeDtypeStruct((batch, 7, 6, 3), jnp.float32)
    exported = jax.export.export(jax.jit(layer))(images)
    x = make_input(5, 7, 6, 3)
    np.testing.assert_array_equal(exported.call(x), jax.jit(layer)(x))

  def test_gradients_of_few_channels_equal_the_native_ones(self):
    layer = nn.SlicedConv(3, 4, 3, stride=2, rngs=nnx.Rngs(0))
    x, kernel = make_input(2, 7, 6, 3), layer.kernel[...]
    graph, state = nnx.split(layer)

    def ours(x, kernel, stride):
      del stride
      return nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(x)

    found = gradients(ours, x, kernel, 2)
    expected = gradients(conv.native_conv, x, kernel, 2)
    for one, other in zip(found, expected, strict=True):
      assert_close(one, other, FLOAT32)

  def test_no_width_means_the_full_one(self):
    layer = nn.SlicedConv(4, 6, 3, rngs=nnx.Rngs(0))
    x = make_input(2, 5, 5, 4)
    np.testing.assert_array_equal(layer(x), layer(x, 6))

  def test_wider_slice_begins_with_the_narrower(self):
    layer = nn.SlicedConv(4, 6, 3, rngs=nnx.Rngs(0))
    x = make_input(2, 5, 5, 4)
    assert_close(layer(x, 6)[..., :2], layer(x, 2), FLOAT32)

  def test_gradient_stays_inside_the_slice(self):
    graph, params = nnx.split(nn.SlicedConv(4, 6, 3, rngs=nnx.Rngs(0)))
    x = make_input(2, 5, 5, 3)

    def loss(params):
      return (nnx.merge(graph, params)(x, 2) ** 2).sum()

    gradient = np.asarray(jax.grad(loss)(params)['kernel'][...])
    assert (gradient[:, :, :3, :2] != 0).all()
    assert (gradient[:, :, 3:] == 0).all() and (gradient[..., 2:] == 0).all()

  def test_bfloat16_images_give_bfloat16(self):
    layer = nn.SlicedConv(4, 6, 3, rngs=nnx.Rngs(0))
    x = make_input(2, 5, 5, 4)
    y = layer(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and layer.kernel.dtype == jnp.float32
    assert_close(y, layer(x), BFLOAT16)

  @parameterized.parameters((5, 6), (4, 7))
  def test_too_wide_a_slice_is_refused(self, width_in, width):
    layer = nn.SlicedConv(4, 6, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f'Slice {width_in} -> {width} does'):
      layer(make_input(1, 4, 4, width_in), width)


class SlicedDepthwiseConvTest(parameterized.TestCase):
  @parameterized.parameters((1, 4), (2, 4), (1, 2), (2, 1))
  def test_slice_equals_a_convolution_of_that_width(self, stride, width):
    layer = nn.SlicedDepthwiseConv(4, 3, stride=stride, rngs=nnx.Rngs(0))
    x = make_input(2, 7, 6, width)
    kernel = np.array(layer.kernel[...])[..., :width]
    assert_close(layer(x), numpy_depthwise_conv(x, kernel, stride), FLOAT32)

  @parameterized.parameters((1, 1), (3, 1), (5, 1), (3, 2), (1, 2))
  def test_smaller_kernel_is_the_centre(self, kernel_size, stride):
    layer = nn.SlicedDepthwiseConv(4, 5, stride=stride, rngs=nnx.Rngs(0))
    x = make_input(2, 7, 6, 3)
    border = {1: 2, 3: 1, 5: 0}[kernel_size]
    kernel = np.array(layer.kernel[...])[..., :3]
    kernel = kernel[border : 5 - border, border : 5 - border]
    assert kernel.shape == (kernel_size, kernel_size, 1, 3)
    expected = numpy_depthwise_conv(x, kernel, stride)
    assert_close(layer(x, kernel_size), expected, FLOAT32)

  def test_gradient_stays_inside_the_slice(self):
    graph, params = nnx.split(nn.SlicedDepthwiseConv(4, 5, rngs=nnx.Rngs(0)))
    x = make_input(2, 6, 5, 3)

    def loss(params):
      return (nnx.merge(graph, params)(x, 3) ** 2).sum()

    gradient = np.array(jax.grad(loss)(params)['kernel'][...])
    assert (gradient[1:4, 1:4, :, :3] != 0).all()
    gradient[1:4, 1:4, :, :3] = 0
    assert (gradient == 0).all()

  def test_too_wide_a_slice_is_refused(self):
    layer = nn.SlicedDepthwiseConv(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='Slice of 5 channels does not fit'):
      layer(make_input(1, 4, 4, 5))

  @parameterized.parameters(2, 4, 5)
  def test_even_or_too_large_a_kernel_is_refused(self, kernel_size):
    layer = nn.SlicedDepthwiseConv(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f'Kernel slice {kernel_size} does'):
      layer(make_input(1, 4, 4, 4), kernel_size)


class DepthwiseConvTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  def test_every_form_equals_numpy(self, kernel_size, stride, height, width):
    x = make_input(2, height, width, 3)
    kernel = make_input(kernel_size, kernel_size, 1, 3, seed=1)
    expected = numpy_depthwise_conv(x, kernel, stride)
    for form in (
      conv.depthwise_conv,
      conv.shifted_depthwise_conv,
      conv.native_depthwise_conv,
    ):
      y = jax.jit(form, static_argnums=2)(x, kernel, stride)
      assert_close(y, expected, FLOAT32)

  @parameterized.parameters(1, 2)
  def test_many_channels_equal_numpy(self, stride):
    x, kernel = make_input(2, 7, 6, 40), make_input(3, 3, 1, 40, seed=1)
    y = jax.jit(conv.shifted_depthwise_conv, static_argnums=2)(
      x, kernel, stride
    )
    assert_close(y, numpy_depthwise_conv(x, kernel, stride), FLOAT32)

  @parameterized.parameters(
    *((*shape, 3) for shape in SHAPES),
    (3, 1, 7, 6, 40),
    # Some pixels meet no tap of a kernel smaller than the stride.
    (1, 2, 7, 6, 3),
    (3, 4, 7, 9, 3),
  )
  def test_gradients_equal_the_native_ones(
    self, kernel_size, stride, height, width, channels
  ):
    x = make_input(2, height, width, channels)
    kernel = make_input(kernel_size, kernel_size, 1, channels, seed=1)
    expected = gradients(conv.native_depthwise_conv, x, kernel, stride)
    for form in (conv.depthwise_conv, conv.shifted_depthwise_conv):
      dx, dkernel = gradients(form, x, kernel, stride)
      assert_close(dx, expected[0], FLOAT32)
      # The kernel's gradient sums over all of the 2 * 9 * 7 pixels.
      assert_close(dkernel, expected[1], FLOAT32)

  @parameterized.parameters(1, 2)
  def test_bfloat16_is_near_float32(self, stride):
    x, kernel = make_input(2, 7, 6, 3), make_input(3, 3, 1, 3, seed=1)
    half = [jnp.asarray(v, jnp.bfloat16) for v in (x, kernel)]
    y = conv.depthwise_conv(*half, stride)
    found = gradients(conv.depthwise_conv, *half, stride)
    assert [v.dtype for v in (y, *found)] == [jnp.bfloat16] * 3
    assert_close(y, numpy_depthwise_conv(x, kernel, stride), BFLOAT16)
    expected = gradients(conv.native_depthwise_conv, x, kernel, stride)
    assert_close(found[0], expected[0], BFLOAT16)
    assert_close(found[1], expected[1], BFLOAT16)


class DepthwiseProgramTest(parameterized.TestCase):
  x = make_input(2, 6, 5, 8)
  kernel = make_input(3, 3, 1, 8, seed=1)

  def value_and_gradients(self, form, x, kernel):
    return jax.value_and_grad(
      lambda x, kernel: (form(x, kernel, 1) ** 2).sum(), argnums=(0, 1)
    )(x, kernel)

  def program(self, form):
    function = jax.jit(functools.partial(self.value_and_gradients, form))
    return function.lower(self.x, self.kernel).compile().as_text()

  def test_cpu_program_has_no_grouped_convolution(self):
    grouped = ('feature_group_count', 'batch_group_count', 'convolution(')
    assert 'feature_group_count=8' in self.program(conv.native_depthwise_conv)
    program = self.program(conv.depthwise_conv)
    assert not [word for word in grouped if word in program]

  def test_export_for_three_platforms_holds_both_forms(self):
    function = functools.partial(self.value_and_gradients, conv.depthwise_conv)
    exported = jax.export.export(
      jax.jit(function), platforms=('cpu', 'cuda', 'tpu')
    )(self.x, self.kernel)
    assert 'feature_group_count = 8' in exported.mlir_module()
    found = exported.call(self.x, self.kernel)
    expected = self.value_and_gradients(
      conv.native_depthwise_conv, self.x, self.kernel
    )
    for one, other in zip(
      *map(jax.tree.leaves, (found, expected)), strict=True
    ):
      assert_close(one, other, FLOAT32)
