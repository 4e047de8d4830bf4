"""Vision transformers of timm, DeiT and Hugging Face as a `VisionTransformer`.

Axes: T tokens, D embedding, P side of a patch, h heads, d width of a head.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from ds_jax import models
from ds_jax.convert import loading

# How the names begin that only these formats have.
TIMM_PATTERN = r'blocks\.\d+\.attn\.'
HUGGING_FACE_PATTERN = (
  r'(?:(?:vit|deit)\.)?'
  r'(?:encoder\.layer\.\d+\.attention\.attention|layers\.\d+\.attention)\.'
)
_DISTILLED = ('dist_token', 'embeddings.distillation_token')


@dataclasses.dataclass(frozen=True)
class _Names:
  """How a library names the layers.

  Attributes:
    outside: the modules outside the blocks, by ours.
    block: the prefix of a block, from its number.
    inside: the modules in a block, by ours; queries, keys and values may be
      one or three.
  """

  outside: Mapping[str, str]
  block: str
  inside: Mapping[str, tuple[str, ...]]


_TIMM = _Names(
  outside={
    'patches': 'patch_embed.proj',
    'class_token': 'cls_token',
    'position': 'pos_embed',
    'norm': 'norm',
    'classifier': 'head',
  },
  block='blocks.{}.',
  inside={
    'attention_norm': ('norm1',),
    'query_key_value': ('attn.qkv',),
    'project': ('attn.proj',),
    'mlp_norm': ('norm2',),
    'expand': ('mlp.fc1',),
    'reduce': ('mlp.fc2',),
  },
)
_HUGGING_FACE = _Names(
  outside={
    'patches': 'embeddings.patch_embeddings.projection',
    'class_token': 'embeddings.cls_token',
    'position': 'embeddings.position_embeddings',
    'norm': 'layernorm',
    'classifier': 'classifier',
  },
  block='encoder.layer.{}.',
  inside={
    'attention_norm': ('layernorm_before',),
    'query_key_value': (
      'attention.attention.query',
      'attention.attention.key',
      'attention.attention.value',
    ),
    'project': ('attention.output.dense',),
    'mlp_norm': ('layernorm_after',),
    'expand': ('intermediate.dense',),
    'reduce': ('output.dense',),
  },
)
# As `transformers` names them in memory since its release 5; its files keep the
# names above.
_TRANSFORMERS = _Names(
  outside=_HUGGING_FACE.outside,
  block='layers.{}.',
  inside={
    'attention_norm': ('layernorm_before',),
    'query_key_value': (
      'attention.q_proj',
      'attention.k_proj',
      'attention.v_proj',
    ),
    'project': ('attention.o_proj',),
    'mlp_norm': ('layernorm_after',),
    'expand': ('mlp.fc1',),
    'reduce': ('mlp.fc2',),
  },
)


def from_timm_vit(state: Mapping[str, Any], model: nnx.Module) -> nnx.Module:
  """Loads a pre-norm ViT's weights; the widest network is that network.

  The names are timm's, which DeiT shares, or Hugging Face's, of files or of
  models in memory. Blocks fill the model's stages in order. A position
  embedding for another image size is resized, bicubically. Queries, keys and
  values without biases get zeros, which is the same. The gate stays the model's
  own.

  The numbers are the source's where it adds 1e-6 to a layer norm's variance, as
  timm and DeiT do. Hugging Face adds 1e-12: there a token of variance v comes
  out larger by a share of 0.5e-6 / v, which is below float32's rounding for v
  of more than 10.

  Args:
    state: PyTorch names to arrays (NumPy or torch), with or without a wrapper's
      prefix and `vit.` before them. Hugging Face's pooler is ignored.
    model: a `VisionTransformer` of the same embedding, hidden units, number of
      blocks, patches and pooling, for example `create_model('ds_vit_s16')`; it
      is not changed. Its heads must be as wide as the source's, which can't be
      told from weights. With another number of classes it keeps its classifier.

  Returns:
    A model with these weights.

  Raises:
    ValueError: that lists every missing, unknown and misshapen name; or for a
      distilled DeiT, whose second token changes every block's attention, or a
      norm after pooling (timm's `fc_norm`), for the model has neither.
  """
  loading.check_family(model, models.VisionTransformer, 'ViT weights')
  state = _plain_names(state)
  _check_supported(state)
  names = _names_of(state)
  return loading.load(
    state,
    model,
    functools.partial(_source_of, names, state, model),
    f'{names.outside["classifier"]}.weight',
  )


def _plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the state without the prefix of the whole ViT and the pooler."""
  plain = loading.plain_names(
    state, f'(?:{TIMM_PATTERN}|{HUGGING_FACE_PATTERN})'
  )
  return {
    re.sub(r'^(vit|deit)\.', '', name): array
    for name, array in plain.items()
    if '.pooler.' not in f'.{name}'
  }


def embedding_width(state: Mapping[str, Any]) -> int | None:
  """Returns D of a ViT's state; None if there is no position embedding."""
  state = _plain_names(state)
  for names in (_TIMM, _HUGGING_FACE):
    if names.outside['position'] in state:
      return state[names.outside['position']].shape[-1]
  return None


def _names_of(state) -> _Names:
  for names in (_HUGGING_FACE, _TRANSFORMERS):
    if any(name.startswith(names.block.partition('{')[0]) for name in state):
      return names
  return _TIMM


def _check_supported(state):
  distilled = [name for name in _DISTILLED if name in state]
  if distilled:
    raise ValueError(
      f'These are the weights of a distilled DeiT ({distilled[0]}): the model'
      ' has no distillation token; take the DeiT without distillation.'
    )
  if 'fc_norm.weight' in state:
    raise ValueError(
      'These weights norm after the pooling (fc_norm.weight) and the model'
      ' before it; take a ViT that is pooled by its class token, or one of timm'
      ' with fc_norm=False.'
    )


def _source_of(names, state, model, path, shape) -> loading.Source | None:
  if models.is_slimming(path):
    return None
  module, _, leaf = path.rpartition('/')
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(\w+)', module)
  if match:
    number = _block_number(model, int(match[1]), int(match[2]))
    theirs = [names.block.format(number) + n for n in names.inside[match[3]]]
    if match[3] == 'query_key_value':
      if leaf == 'bias' and not _has_attention_biases(names, state):
        return loading.Source((), (), lambda _: np.zeros(shape, np.float32))
      return _attention_source(theirs, leaf, shape, model.head_dim)
    return loading.torch_source(theirs[0], leaf, shape)
  name = names.outside[module or path]
  if path == 'class_token':
    return loading.Source(
      (name,), ((1, 1, *shape),), lambda a: loading.only(a).reshape(shape)
    )
  if path == 'position':
    found = state[name].shape if name in state else (1, *shape)
    prefix = model.class_token is not None
    return loading.position_source(name, found, shape, int(prefix))
  if path == 'patches/kernel':
    return _patches_source(name, shape, model.patch_size)
  return loading.torch_source(name, leaf, shape)


def _has_attention_biases(names, state) -> bool:
  endings = tuple(f'{n}.bias' for n in names.inside['query_key_value'])
  return any(name.endswith(endings) for name in state)


def _block_number(model, stage, block) -> int:
  return sum(spec.depths[-1] for spec in model.specs[:stage]) + block


def _patches_source(name, shape, size) -> loading.Source:
  """A convolution (D, 3, P, P) as a dense layer of (P, P, 3) inputs."""
  return loading.Source(
    (f'{name}.weight',),
    ((shape[1], 3, size, size),),
    lambda w: loading.only(w).transpose(2, 3, 1, 0).reshape(shape),
  )


def _attention_source(modules, leaf, shape, head_dim) -> loading.Source:
  """Queries, keys and values, each (h d, D), as (D, h 3 d)."""
  width = shape[-1] // len(modules)
  kind = 'weight' if leaf == 'kernel' else 'bias'

  def assemble(arrays):
    stacked = np.concatenate(arrays)
    by_head = stacked.reshape(3, -1, head_dim, *stacked.shape[1:])
    return by_head.swapaxes(0, 1).reshape(stacked.shape).T

  return loading.Source(
    tuple(f'{module}.{kind}' for module in modules),
    ((width, *shape[:-1]),) * len(modules),
    assemble,
  )
