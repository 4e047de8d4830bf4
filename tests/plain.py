"""Ordinary networks, by torchvision's and timm's names, written anew.

Random weights of any size, and what a network with these weights computes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import fixed
from ds_jax import models

# Supernets whose widest networks are those of the states below.
RESNET = dict(
  stem=dict(widths=(4, 8)),
  stages=(
    dict(widths=(8, 16), inner=(4, 6), depths=(1,)),
    dict(widths=(12, 16, 24), inner=(4, 6, 8), depths=(1, 2, 2), stride=2),
  ),
  gate_stage=1,
)
VIT = dict(
  image_size=16,
  patch_size=4,
  head_dim=4,
  stages=(
    dict(widths=(12,), heads=(3,), hidden=(20,), depths=(1,)),
    dict(widths=(8, 12), heads=(1, 3), hidden=(8, 20), depths=(1, 2)),
  ),
  gate_stage=1,
)


def random_model(name, num_classes, *, seed=0, **options):
  """A model with random weights; unlike `create_model`, it compiles nothing."""
  model = models.create_abstract_model(name, num_classes, **options)
  variables = fixed.random_variables(model, seed)
  return models.Architecture(model).bind(
    models.variables_from(dataclasses.asdict(variables))
  )


def logits(model, images, subnet):
  """Runs a sub-network in one program."""
  architecture = models.Architecture(model)
  run = jax.jit(lambda variables: architecture.bind(variables)(images, subnet))
  return np.asarray(run(models.variables_of(model)))


def resnet_state(
  num_classes=5, stem=(8, 7), stages=((16, 6, 1), (24, 8, 2)), seed=0
):
  """A ResNet's state: the stem's width and kernel; width, inner, depth."""
  width, size = stem
  shapes = {'conv1.weight': (width, 3, size, size), **_norm('bn1', width)}
  for i, (features, inner, depth) in enumerate(stages):
    for j in range(depth):
      block = f'layer{i + 1}.{j}'
      shapes |= {
        f'{block}.conv1.weight': (inner, width, 1, 1),
        **_norm(f'{block}.bn1', inner),
        f'{block}.conv2.weight': (inner, inner, 3, 3),
        **_norm(f'{block}.bn2', inner),
        f'{block}.conv3.weight': (features, inner, 1, 1),
        **_norm(f'{block}.bn3', features),
      }
      if j == 0:
        shapes[f'{block}.downsample.0.weight'] = (features, width, 1, 1)
        shapes |= _norm(f'{block}.downsample.1', features)
      width = features
  shapes |= _dense('fc', width, num_classes)
  return _random(shapes, seed)


def vit_state(
  num_classes=5,
  width=12,
  hidden=20,
  depth=3,
  patch_size=4,
  side=4,
  class_token=True,
  seed=0,
):
  """A ViT's state for `side * side` patches."""
  shapes = {'cls_token': (1, 1, width)} if class_token else {}
  shapes |= {
    'pos_embed': (1, side**2 + class_token, width),
    'patch_embed.proj.weight': (width, 3, patch_size, patch_size),
    'patch_embed.proj.bias': (width,),
  }
  for j in range(depth):
    block = f'blocks.{j}'
    shapes |= {
      **_affine(f'{block}.norm1', width),
      **_dense(f'{block}.attn.qkv', width, 3 * width),
      **_dense(f'{block}.attn.proj', width, width),
      **_affine(f'{block}.norm2', width),
      **_dense(f'{block}.mlp.fc1', width, hidden),
      **_dense(f'{block}.mlp.fc2', hidden, width),
    }
  shapes |= {**_affine('norm', width), **_dense('head', width, num_classes)}
  return _random(shapes, seed)


# The names of https://huggingface.co/docs/transformers/model_doc/vit.
_HUGGING_FACE = (
  ('cls_token', 'vit.embeddings.cls_token'),
  ('pos_embed', 'vit.embeddings.position_embeddings'),
  ('patch_embed.proj', 'vit.embeddings.patch_embeddings.projection'),
  ('blocks.', 'vit.encoder.layer.'),
  ('norm1', 'layernorm_before'),
  ('norm2', 'layernorm_after'),
  ('attn.proj', 'attention.output.dense'),
  ('mlp.fc1', 'intermediate.dense'),
  ('mlp.fc2', 'output.dense'),
  ('head.', 'classifier.'),
)


def hugging_face(state):
  """A ViT's state by Hugging Face's names."""
  renamed = {}
  for name, array in state.items():
    if name.startswith('norm.'):
      name = f'vit.layer{name}'
    for theirs, new in _HUGGING_FACE:
      name = name.replace(theirs, new)
    if 'attn.qkv' in name:
      parts = np.split(array, 3)
      for kind, part in zip(('query', 'key', 'value'), parts, strict=True):
        new = name.replace('attn.qkv', f'attention.attention.{kind}')
        renamed[new] = part
    else:
      renamed[name] = array
  return renamed


_TRANSFORMERS_5 = (
  # As listed by the state_dict of its ViTForImageClassification, release 5.24.
  ('encoder.layer.', 'layers.'),
  ('attention.attention.query', 'attention.q_proj'),
  ('attention.attention.key', 'attention.k_proj'),
  ('attention.attention.value', 'attention.v_proj'),
  ('attention.output.dense', 'attention.o_proj'),
  ('intermediate.dense', 'mlp.fc1'),
  ('output.dense', 'mlp.fc2'),
)


def transformers_5(state):
  """A ViT's state by the names of `transformers` 5 in memory."""
  renamed = {}
  for name, array in hugging_face(state).items():
    for old, new in _TRANSFORMERS_5:
      name = name.replace(old, new)
    renamed[name] = array
  return renamed


def resnet_logits(state, images, stem_stride=2, pool=True):
  """Logits (N, classes) of images (N, H, W, 3): v1.5, in eval mode."""
  x = _conv(images, state, 'conv1', stem_stride)
  x = jax.nn.relu(_batch_norm(x, state, 'bn1'))
  if pool:
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, strides, padding)
  blocks = sorted({tuple(n.split('.')[:2]) for n in state if 'layer' in n})
  for layer, j in blocks:
    name, stride = f'{layer}.{j}', 2 if (layer > 'layer1' and j == '0') else 1
    y = _conv(x, state, f'{name}.conv1')
    y = jax.nn.relu(_batch_norm(y, state, f'{name}.bn1'))
    y = _conv(y, state, f'{name}.conv2', stride)
    y = jax.nn.relu(_batch_norm(y, state, f'{name}.bn2'))
    y = _conv(y, state, f'{name}.conv3')
    y = _batch_norm(y, state, f'{name}.bn3')
    if j == '0':
      x = _conv(x, state, f'{name}.downsample.0', stride)
      x = _batch_norm(x, state, f'{name}.downsample.1')
    x = jax.nn.relu(x + y)
  return _linear(x.mean((1, 2)), state, 'fc')


def vit_logits(state, images, head_dim=4, epsilon=1e-6):
  """Logits (N, classes) of images (N, H, W, 3)."""
  kernel = state['patch_embed.proj.weight'].transpose(2, 3, 1, 0)
  x = jax.lax.conv_general_dilated(
    images,
    kernel,
    kernel.shape[:2],
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  x = x.reshape(len(x), -1, x.shape[-1])
  x += state['patch_embed.proj.bias'].reshape(1, 1, -1)
  if 'cls_token' in state:
    token = jnp.tile(state['cls_token'], (len(x), 1, 1))
    x = jnp.concatenate([token, x], 1)
  x += state['pos_embed']
  for j in range(sum(name.endswith('norm1.bias') for name in state)):
    y = _layer_norm(x, state, f'blocks.{j}.norm1', epsilon)
    x += _attention(y, state, f'blocks.{j}.attn', head_dim)
    y = _layer_norm(x, state, f'blocks.{j}.norm2', epsilon)
    y = _linear(y, state, f'blocks.{j}.mlp.fc1')
    y = y * 0.5 * (1 + jax.scipy.special.erf(y / math.sqrt(2)))
    x += _linear(y, state, f'blocks.{j}.mlp.fc2')
  x = _layer_norm(x, state, 'norm', epsilon)
  return _linear(x[:, 0] if 'cls_token' in state else x.mean(1), state, 'head')


def _attention(x, state, name, head_dim):
  batch, tokens, width = x.shape
  y = _linear(x, state, f'{name}.qkv')
  y = y.reshape(batch, tokens, 3, width // head_dim, head_dim)
  query, key, value = (y[:, :, i] for i in range(3))
  weights = jnp.einsum('nqhd,nkhd->nhqk', query, key) / math.sqrt(head_dim)
  weights = jax.nn.softmax(weights)
  y = jnp.einsum('nhqk,nkhd->nqhd', weights, value)
  return _linear(y.reshape(x.shape), state, f'{name}.proj')


def _conv(x, state, name, stride=1):
  kernel = state[f'{name}.weight'].transpose(2, 3, 1, 0)
  return fixed.convolve(x, kernel, stride)


def _batch_norm(x, state, name):
  scale, bias, mean, variance = (
    state[f'{name}.{kind}'].reshape(1, 1, 1, -1)
    for kind in ('weight', 'bias', 'running_mean', 'running_var')
  )
  return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def _layer_norm(x, state, name, epsilon):
  x = x - x.mean(-1, keepdims=True)
  x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  scale, bias = (
    state[f'{name}.{kind}'].reshape(1, 1, -1) for kind in ('weight', 'bias')
  )
  return x * scale + bias


def _linear(x, state, name):
  bias = fixed.along_channels(state[f'{name}.bias'], x.ndim)
  return x @ state[f'{name}.weight'].T + bias


def _norm(name, width):
  statistics = ('running_mean', 'running_var')
  return {
    **_affine(name, width),
    **{f'{name}.{kind}': (width,) for kind in statistics},
    f'{name}.num_batches_tracked': (),
  }


def _affine(name, width):
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _dense(name, inputs, outputs):
  return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def _random(shapes, seed):
  rng = np.random.default_rng(seed)
  return {name: _fill(rng, name, shape) for name, shape in shapes.items()}


def _fill(rng, name, shape):
  array = rng.normal(size=shape).astype(np.float32)
  if name.endswith('running_var'):
    return 0.5 + np.abs(array)
  if len(shape) == 1 and name.endswith('weight'):
    return 1 + 0.3 * array
  if len(shape) < 2 or name in ('cls_token', 'pos_embed'):
    return 0.3 * array
  return array / np.float32(math.sqrt(math.prod(shape[1:])))
