"""Initial weights as PyTorch's networks have them.

A layer draws its own: a dense one LeCun's, a convolution He's by its outputs.
The choices here redraw the dense ones of a new model. Convolutions keep theirs,
which timm's networks have as well, and what starts at zero, so that a head is
the identity at first, stays so.

Axes: I input features, O output features.
"""

import jax
from flax import nnx

from ds_jax import validation
from ds_jax.nn import dense

INITS = ('lecun', 'fan_out', 'truncated_normal')


def redraw(model: nnx.Module, init: str, rngs: nnx.Rngs) -> None:
  """Draws the kernels of a new model's dense layers again.

  Args:
    model: changed in place.
    init: `lecun` leaves all as they are. `fan_out` is that of the authors'
      release and of timm's EfficientNets: a normal distribution of variance 2 /
      O, and for the classifier a uniform one within 1 / sqrt(O).
      `truncated_normal` is that of DeiT and of timm's ViTs: a normal one of
      standard deviation 0.02 (cut at 2, which is never), and for kernel and
      bias of the patches a uniform one within 1 / sqrt(I).
    rngs: the stream `params` gives the keys.

  Raises:
    ValueError: for another `init`.
  """
  validation.check_choice('init', init, INITS)
  if init == 'lecun':
    return
  for path, layer in nnx.iter_modules(model):
    if isinstance(layer, dense.SlicedDense):
      _redraw_layer(path[-1], layer, init, rngs)


def _redraw_layer(name, layer, init, rngs):
  width_in, width = layer.kernel.shape
  if init == 'fan_out' and name == 'classifier':
    draw = _uniform_within(width**-0.5)
  elif init == 'fan_out':
    draw = nnx.initializers.normal((2 / width) ** 0.5)
  elif name == 'patches':
    draw = _uniform_within(width_in**-0.5)
    layer.bias[...] = draw(rngs.params(), layer.bias.shape)
  else:
    draw = nnx.initializers.normal(0.02)
  kernel = draw(rngs.params(), layer.kernel.shape)
  layer.kernel[...] = kernel * (layer.kernel[...] != 0).any()


def _uniform_within(bound):
  return lambda key, shape: jax.random.uniform(
    key, shape, minval=-bound, maxval=bound
  )
