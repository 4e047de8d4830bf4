"""torchvision's ResNet-50 as a `ResNet`."""

import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from ds_jax import models
from ds_jax.convert import loading

# How the names begin that only this format has.
PATTERN = r'layer\d+\.\d+\.conv'
_OUTSIDE = {'stem': 'conv1', 'stem_norm': 'bn1', 'classifier': 'fc'}
_LAYERS = {
  'reduce': 'conv1',
  'reduce_norm': 'bn1',
  'spatial': 'conv2',
  'spatial_norm': 'bn2',
  'expand': 'conv3',
  'expand_norm': 'bn3',
  'projection': 'downsample.0',
  'projection_norm': 'downsample.1',
}


def from_torchvision_resnet50(
  state: Mapping[str, Any], model: nnx.Module
) -> nnx.Module:
  """Loads torchvision's ResNet-50 weights; the widest network is that network.

  timm's `resnet50` has the same names. Every row of statistics takes the
  source's, right for the widest network alone. What the source does not have
  stays the model's own: the attention, the identity in a fresh model, and the
  gate.

  Args:
    state: PyTorch names to arrays (NumPy or torch); a wrapper's prefix and
      `num_batches_tracked` are ignored.
    model: a `ResNet` of the same depths and widths, for example
      `create_model('ds_resnet50')`; it is not changed. With another number of
      classes it keeps its classifier.

  Returns:
    A model with these weights and statistics.

  Raises:
    ValueError: that lists every missing, unknown and misshapen name.
  """
  loading.check_family(model, models.ResNet, "torchvision's ResNet weights")
  return loading.load(
    loading.plain_names(state, PATTERN), model, _source_of, 'fc.weight'
  )


def _source_of(path, shape) -> loading.Source | None:
  module, leaf = path.rsplit('/', 1)
  if module in _OUTSIDE:
    return loading.torch_source(_OUTSIDE[module], leaf, shape)
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(\w+)', module)
  if not match:  # The attention and the gate.
    return None
  name = f'layer{int(match[1]) + 1}.{match[2]}.{_LAYERS[match[3]]}'
  return loading.torch_source(name, leaf, shape)
