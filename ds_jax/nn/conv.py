"""Convolutions whose narrower versions are leading slices of their kernel.

Axes: N batch, H height, W width, I input channels, O output channels, k kernel
size. Images are NHWC; padding is k // 2 on each side, as in PyTorch, for odd k.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax.nn import dense, fusion

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')

# Of a convolution on CPU that is a product of patches. An image has three
# channels; patches of 7 x 7 pixels take twice as long as XLA's own.
_FEW_CHANNELS = 4
_SMALL = 3
# Of a depthwise convolution on CPU: with fewer, a row of pixels is too short.
_WIDE = 32


def output_size(size: int, stride: int) -> int:
  """Returns the side of the output: ceil(size / stride), for any odd kernel."""
  return -(-size // stride)


class SlicedConv(nnx.Module):
  """A k x k convolution without bias; i is read off x, o is chosen."""

  def __init__(
    self,
    in_features: int,
    features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    rngs: nnx.Rngs,
  ):
    """Makes the full-size kernel (k, k, I, O).

    Args:
      in_features: I, the widest input.
      features: O, the widest output.
      kernel_size: k, odd.
      stride: the same in both directions.
      rngs: the stream `params` initialises the kernel.
    """
    init = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    shape = (kernel_size, kernel_size, in_features, features)
    self.kernel = nnx.Param(init(rngs.params(), shape))
    self.stride = stride

  def __call__(
    self,
    x: jax.Array,
    features: int | None = None,
    scale: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the slice that takes x's channels to `features`.

    Args:
      x: (N, H, W, i) with i <= I.
      features: o, static; None means O.
      scale: (O,), of the outputs.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), o), in x's dtype.

    Raises:
      ValueError: if i or o is wider than the kernel.
    """
    size, _, full_in, full_out = self.kernel.shape
    width = full_out if features is None else features
    if x.shape[-1] > full_in or width > full_out:
      raise ValueError(
        f'Slice {x.shape[-1]} -> {width} does not fit a convolution of'
        f' {full_in} -> {full_out} channels.'
      )
    kernel = dense.scaled(self.kernel[:, :, : x.shape[-1], :width], scale)
    kernel = kernel.astype(x.dtype)
    if size == 1:
      return pointwise_conv(x, kernel, self.stride)
    if x.shape[-1] > _FEW_CHANNELS or size > _SMALL:
      return native_conv(x, kernel, self.stride)
    return few_channels_conv(x, kernel, self.stride)


def few_channels_conv(
  x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """`native_conv` of an image's few channels, fast on every platform."""
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(patches_conv, stride=stride),
    default=functools.partial(native_conv, stride=stride),
  )


def pointwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`native_conv` of single pixels, fast on every platform.

  A product on CPU, where XLA's convolutions take longer. cuDNN's also add the
  bias and the shortcut.
  """
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=lambda x, kernel: dense.matmul(x[:, ::stride, ::stride], kernel[0, 0]),
    default=functools.partial(native_conv, stride=stride),
  )


def native_conv(
  x: jax.Array, kernel: jax.Array, stride: int, num_groups: int = 1
) -> jax.Array:
  """A convolution by XLA.

  Args:
    x: (N, H, W, I).
    kernel: (k, k, I / G, O), k odd.
    stride: the same in both directions.
    num_groups: G.

  Returns:
    (N, ceil(H / stride), ceil(W / stride), O).
  """
  padding = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=_DIMENSIONS,
    feature_group_count=num_groups,
  )


def patches_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`native_conv` of few channels as one product with the patches.

  XLA:CPU's own takes longer, and far longer where the number of outputs is no
  power of two. `stride` pixels of a row are one element here, so that a patch
  is a few whole slices of rows.
  """
  size, _, channels, features = kernel.shape
  height, width = (output_size(s, stride) for s in x.shape[1:3])
  padding = size // 2
  # Elements of a row: those where a patch may start, and a patch's others.
  elements = width + (size - 1) // stride
  pad_right = elements * stride - padding - x.shape[2]
  rows = jax.lax.pad(
    x,
    jnp.zeros((), x.dtype),
    ((0, 0, 0), (padding, padding, 0), (padding, pad_right, 0), (0, 0, 0)),
  )
  rows = rows.reshape(*rows.shape[:2], elements, stride * channels)
  patches = [
    rows[
      :,
      i : i + stride * (height - 1) + 1 : stride,
      j // stride : j // stride + width,
      : min(stride, size - j) * channels,
    ]
    for i in range(size)
    for j in range(0, size, stride)
  ]
  return dense.matmul(
    jnp.concatenate(patches, -1), kernel.reshape(-1, features)
  )


class SlicedDepthwiseConv(nnx.Module):
  """A depthwise convolution; a smaller kernel is the centre of the full one."""

  def __init__(
    self, features: int, kernel_size: int, *, stride: int = 1, rngs: nnx.Rngs
  ):
    """Makes the full-size kernel (k, k, 1, C).

    Args:
      features: C, the widest input and output.
      kernel_size: k, odd: the largest.
      stride: the same in both directions.
      rngs: the stream `params` initialises the kernel.
    """
    init = nnx.initializers.variance_scaling(2.0, 'fan_in', 'normal')
    shape = (kernel_size, kernel_size, 1, features)
    self.kernel = nnx.Param(init(rngs.params(), shape))
    self.stride = stride

  def __call__(
    self,
    x: jax.Array,
    kernel_size: int | None = None,
    scale: jax.Array | None = None,
  ) -> jax.Array:
    """Convolves each channel of x with the centre of its kernel.

    Args:
      x: (N, H, W, c) with c <= C.
      kernel_size: odd, static; None means the full size.
      scale: (C,), of the outputs.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), c), in x's dtype.

    Raises:
      ValueError: if x is wider, or `kernel_size` larger, than the kernel, or
        `kernel_size` is even.
    """
    full_size, _, _, full_width = self.kernel.shape
    size = full_size if kernel_size is None else kernel_size
    if x.shape[-1] > full_width:
      raise ValueError(
        f'Slice of {x.shape[-1]} channels does not fit a depthwise convolution'
        f' of {full_width}.'
      )
    if not 0 < size <= full_size or size % 2 == 0:
      raise ValueError(
        f'Kernel slice {size} does not fit: expected an odd number up to'
        f' {full_size}.'
      )
    start = (full_size - size) // 2
    stop = start + size
    kernel = self.kernel[start:stop, start:stop, :, : x.shape[-1]]
    kernel = dense.scaled(kernel, scale)
    return depthwise_conv(x, kernel.astype(x.dtype), self.stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Convolves each channel with its own kernel, fast on every platform.

  XLA:CPU runs a grouped convolution far slower than the same sum of k * k
  shifted and scaled images, and the weight gradient that autodiff makes of that
  sum is slow again. Elsewhere the native convolution is right. The choice is
  made at lowering, so a program exported for several platforms holds both.

  Args:
    x: (N, H, W, C).
    kernel: (k, k, 1, C), k odd.
    stride: the same in both directions.

  Returns:
    (N, ceil(H / stride), ceil(W / stride), C).
  """
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(shifted_depthwise_conv, stride=stride),
    default=functools.partial(native_depthwise_conv, stride=stride),
  )


def native_depthwise_conv(
  x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """`depthwise_conv` as one grouped convolution."""
  return native_conv(x, kernel, stride, num_groups=x.shape[-1])


def shifted_depthwise_conv(
  x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """`depthwise_conv` as a sum of k * k shifted, scaled images."""
  size = kernel.shape[0]
  height, width = (output_size(s, stride) for s in x.shape[1:3])
  padded = _pad_image(x, size)
  if x.shape[-1] >= _WIDE:
    # Or x is computed once for the padded image and again for the middle of the
    # kernel.
    padded = fusion.as_it_is(padded)
  total = 0.0
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + stride * (height - 1) + 1, stride)
      columns = slice(j, j + stride * (width - 1) + 1, stride)
      total += padded[:, rows, columns] * kernel[i, j].reshape(1, 1, 1, -1)
  return total


def _shifted_kernel_gradient(
  x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int
) -> jax.Array:
  """The kernel's gradient as k * k running sums over the output's rows.

  XLA:CPU neither vectorises nor parallelises k * k reductions over slices of
  one image, but it does vectorise adding a row to each of k * k running sums.
  Rows, not images, are scanned, since the batch may be spread over devices.
  """
  size = kernel.shape[0]
  batch, height, width, channels = dy.shape
  padded = _pad_image(x, size)

  def add_row(sums, row):
    window = jax.lax.dynamic_slice_in_dim(padded, row * stride, size, axis=1)
    dy_row = jax.lax.dynamic_index_in_dim(dy, row, axis=1, keepdims=False)
    columns = [
      slice(j, j + stride * (width - 1) + 1, stride) for j in range(size)
    ]
    taps = [
      window[:, i, columns[j]] * dy_row
      for i in range(size)
      for j in range(size)
    ]
    return [s + t.astype(s.dtype) for s, t in zip(sums, taps, strict=True)], ()

  zero = jnp.zeros((batch, width, channels), jnp.float32)
  sums, _ = jax.lax.scan(add_row, [zero] * size**2, jnp.arange(height))
  gradient = jnp.stack([s.sum((0, 1)) for s in sums])
  return gradient.reshape(kernel.shape).astype(kernel.dtype)


def _pad_image(x: jax.Array, kernel_size: int) -> jax.Array:
  padding = kernel_size // 2
  return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _shifted_image_gradient(
  x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int
) -> jax.Array:
  """The image's gradient, in a form that XLA:CPU can fuse.

  What autodiff makes of it pads each of the k * k terms separately. That is
  slow when it is fused with what comes after, and all that comes before is
  computed once for each term.
  """
  if stride == 1:
    return shifted_depthwise_conv(dy, kernel[::-1, ::-1], stride)
  size = kernel.shape[0]
  padding = size // 2
  batch, height, width, channels = dy.shape
  before, after = padding // stride, (padding + stride - 1) // stride
  padded = fusion.as_it_is(
    jnp.pad(dy, ((0, 0), (before, after), (before, after), (0, 0)))
  )

  def taps(phase):
    """Which of the kernel, and where dy, meet every `stride`th pixel."""
    return [
      (tap, before + (phase + padding - tap) // stride)
      for tap in range(size)
      if (phase + padding - tap) % stride == 0
    ]

  def pixels(row_phase, column_phase):
    # Of a kernel smaller than the stride, some pixels meet no tap.
    total = jnp.zeros_like(dy)
    for i, top in taps(row_phase):
      for j, left in taps(column_phase):
        term = padded[:, top : top + height, left : left + width]
        total += term * kernel[i, j].reshape(1, 1, 1, -1)
    return total

  rows = [
    jnp.stack([pixels(r, c) for c in range(stride)], axis=3)
    for r in range(stride)
  ]
  dx = jnp.stack(rows, axis=2)
  dx = dx.reshape(batch, height * stride, width * stride, channels)
  return dx[:, : x.shape[1], : x.shape[2]]


def _shifted_gradients(x, kernel, dy, stride):
  return (
    _shifted_image_gradient(x, kernel, dy, stride),
    _shifted_kernel_gradient(x, kernel, dy, stride),
  )


def _native_gradients(x, kernel, dy, stride):
  _, pull = jax.vjp(
    functools.partial(native_depthwise_conv, stride=stride), x, kernel
  )
  return pull(dy)


def _depthwise_forward(x, kernel, stride):
  return depthwise_conv(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, dy):
  return jax.lax.platform_dependent(
    *residuals,
    dy,
    cpu=functools.partial(_shifted_gradients, stride=stride),
    default=functools.partial(_native_gradients, stride=stride),
  )


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)
