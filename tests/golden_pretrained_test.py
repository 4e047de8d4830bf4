"""Tests against logits of torchvision's ResNet-50 and timm's ViT-S/16.

The `.npz` files hold a batch and its logits, computed in eval mode, in float32
on CPU, and the names and shapes of the weights. The weights are random numbers
rebuilt from their names, so no PyTorch is needed.
"""

import math
import pathlib
import zlib

import jax
import numpy as np
import pytest

import plain
from ds_jax import convert, models

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parent


def read(name):
  golden = np.load(FOLDER / f'{name}.npz')
  shapes = (
    tuple(int(side) for side in shape.split(',') if side)
    for shape in golden['shapes'].tolist()
  )
  state = {
    weight: rebuild(weight, shape)
    for weight, shape in zip(golden['names'].tolist(), shapes, strict=True)
  }
  images = golden['input_nchw'].transpose(0, 2, 3, 1)
  return state, images, golden['logits']


def rebuild(name, shape):
  seed = zlib.crc32(name.encode())
  array = np.random.RandomState(seed).standard_normal(shape)
  if name.endswith('num_batches_tracked'):
    return np.zeros(shape)
  if 'running_var' in name:
    array = 0.5 + np.abs(array)
  elif len(shape) == 1 and name.endswith('weight'):
    array = 1 + 0.1 * array
  elif 'running_mean' in name or name.endswith(
    ('bias', 'pos_embed', 'cls_token')
  ):
    array = 0.1 * array
  else:
    array = array / math.sqrt(math.prod(shape[1:]))
  return np.asarray(array, np.float32)


# Float32 through tens of layers, summed in another order.
@pytest.mark.parametrize(
  'source, name, renames',
  [
    ('torchvision_resnet50', 'ds_resnet50', (dict,)),
    ('timm_vit_small_patch16_224', 'ds_vit_s16', (dict, plain.hugging_face)),
  ],
)
def test_widest_network_is_the_source(source, name, renames):
  state, images, expected = read(source)
  model = models.create_model(name)
  architecture = models.Architecture(model)
  run = jax.jit(lambda v: architecture.bind(v)(images, model.widest))
  for rename in renames:
    loaded = convert.from_state(rename(state), model)
    found = np.asarray(run(models.variables_of(loaded)))
    assert found.shape == expected.shape == (2, 1000)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
