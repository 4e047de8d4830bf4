"""The authors' DS-Net release as a `MobileNet`."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from ds_jax import models
from ds_jax.convert import loading

# How the names begin that only this format has.
PATTERN = r'blocks\.\d+\.first_block\.'
_SLIMMING_HEAD = 'gate.gate.0'
_SLIMMING = f'{_SLIMMING_HEAD}.weight'
_OUTSIDE = {'stem': 'conv_stem', 'stem_norm': 'bn1', 'classifier': 'classifier'}
_LAYERS = {
  'depthwise': 'conv_dw',
  'depthwise_norm': 'bn1',
  'gate/reduce': 'gate.conv_reduce',
  'gate/expand': 'gate.conv_expand',
  'gate/slim': _SLIMMING_HEAD,
  'pointwise': 'conv_pw',
  'pointwise_norm': 'bn2',
}


def from_official(state: Mapping[str, Any], model: nnx.Module) -> nnx.Module:
  """Loads the authors' DS-Net weights into a `MobileNet`.

  Args:
    state: PyTorch names to arrays (NumPy or torch), as in the release; a
      wrapper's prefix and `num_batches_tracked` are ignored.
    model: a `MobileNet` of the same widths, for example
      `create_model('ds_mobilenet', **model_options(state))`; it is not changed.
      With another number of classes it keeps its classifier, and with another
      number of buckets its slimming head; otherwise it may be abstract.

  Returns:
    A model with these weights and statistics.

  Raises:
    ValueError: that lists every missing, unknown and misshapen name, or if the
      model's gate is not the published one.
  """
  loading.check_family(model, models.MobileNet, "The authors' DS-Net weights")
  if model.slim is not None:
    raise ValueError(
      "The authors' gate is a head on the attention's reduction: make the"
      " model with gate_head='shared'."
    )
  state = loading.plain_names(state, PATTERN)
  head = _head_of_other_buckets(state, model)
  return loading.load(
    {name: array for name, array in state.items() if name != head},
    model,
    functools.partial(_source_but_of_head if head else source_of, model),
    'classifier.weight',
  )


def _head_of_other_buckets(state, model) -> str | None:
  """Returns the slimming head's name, where its number of buckets differs."""
  num_buckets = len(model.routing_space)
  for name, weight in state.items():
    if name.endswith(_SLIMMING) and weight.shape[0] != num_buckets:
      logging.warning(
        'The slimming head of the weights is for %d buckets and that of the'
        ' model for %d: it stays as it is, untrained. To load theirs, make the'
        ' model with gate_buckets=%s.',
        weight.shape[0],
        num_buckets,
        tuple(range(weight.shape[0])),
      )
      return name
  return None


def _source_but_of_head(model, path, shape):
  return None if models.is_slimming(path) else source_of(model, path, shape)


def model_options(state: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of `create_model` that the weights need.

  The released gate chooses from the first widths only: Stage II of the release
  cuts every slice list.

  Args:
    state: as of `from_official`.
  """
  state = loading.plain_names(state, PATTERN)
  heads = [w.shape[0] for name, w in state.items() if name.endswith(_SLIMMING)]
  rows = [re.search(r'\.bn2\.aux_bn\.(\d+)\.', name) for name in state]
  num_slices = 1 + max((int(match[1]) for match in rows if match), default=0)
  if not heads or heads[0] == num_slices:
    return {}
  return {'gate_buckets': tuple(range(heads[0]))}


def source_of(
  model: models.MobileNet, path: str, shape: tuple[int, ...]
) -> loading.Source:
  """Returns what the array at a path is made of."""
  module, leaf = path.rsplit('/', 1)
  name = _module_name(module)
  if leaf in ('mean', 'variance'):
    return _statistics_source(name, leaf, _norm_widths(model, module), shape)
  if module.endswith('norm'):
    # The affine that all slices share lies in the last one's.
    last = len(_norm_widths(model, module)) - 1
    return loading.torch_source(f'{name}.aux_bn.{last}', leaf, shape)
  if leaf == 'kernel' and len(shape) == 2 and module != 'classifier':
    # Dense layers inside the blocks are 1 x 1 convolutions.
    return loading.Source(
      (f'{name}.weight',),
      ((*shape[::-1], 1, 1),),
      lambda w: loading.only(w)[:, :, 0, 0].T,
    )
  return loading.torch_source(name, leaf, shape)


def _statistics_source(name, leaf, widths, shape) -> loading.Source:
  """One row a slice; a further row, the widest network's, repeats the last."""
  slices = [min(row, len(widths) - 1) for row in range(shape[0])]
  kind, fill = {
    'mean': ('running_mean', 0.0),
    'variance': ('running_var', 1.0),
  }[leaf]

  def assemble(rows):
    full = np.full(shape, fill, np.float32)
    for row, values in enumerate(rows):
      full[row, : len(values)] = values
    return full

  return loading.Source(
    tuple(f'{name}.aux_bn.{i}.{kind}' for i in slices),
    tuple((widths[i],) for i in slices),
    assemble,
  )


def _norm_widths(model, module: str) -> tuple[int, ...]:
  """The slice list of a norm's input, which is also how theirs are counted."""
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(\w+)', module)
  if not match:
    return model.specs[0].widths
  stage, block, norm = int(match[1]), int(match[2]), match[3]
  first_depthwise = norm == 'depthwise_norm' and block == 0
  # `specs` starts with the stem, so a stage's input is at its own index.
  return model.specs[stage if first_depthwise else stage + 1].widths


def _module_name(module: str) -> str:
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(.+)', module)
  if not match:
    return _OUTSIDE[module]
  stage, block, layer = match[1], int(match[2]), match[3]
  place = f'residual_blocks.{block - 1}' if block else 'first_block'
  return f'blocks.{stage}.{place}.{_LAYERS[layer]}'
