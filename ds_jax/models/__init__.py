"""Supernets by name.

Every family is a `SlicedNetwork`: `model(images, subnet)`, its parts `trunk`,
`gate_logits` and `branch`, `all_buckets(images)`, `cost(subnet, image_size)`,
`sub_networks`, `routing_space`, `narrowest` and `widest`.
"""

from ds_jax.models.base import Answers, SlicedNetwork
from ds_jax.models.channels import Group, Member
from ds_jax.models.functional import (
  Architecture,
  Arrays,
  Variables,
  is_slimming,
  variables_from,
  variables_of,
)
from ds_jax.models.mobilenet import MobileNet, StageSpec
from ds_jax.models.registry import (
  create_abstract_model,
  create_model,
  image_size,
  list_models,
  options_of,
  resolved_options,
  size_options,
)
from ds_jax.models.resnet import BottleneckStage, ResNet, Stem
from ds_jax.models.subnet import Cost, StageSlice, Subnet
from ds_jax.models.vit import BlockStage, VisionTransformer

__all__ = [
  'Answers',
  'Architecture',
  'Arrays',
  'BlockStage',
  'BottleneckStage',
  'Cost',
  'Group',
  'Member',
  'MobileNet',
  'ResNet',
  'SlicedNetwork',
  'StageSlice',
  'StageSpec',
  'Stem',
  'Subnet',
  'Variables',
  'VisionTransformer',
  'create_abstract_model',
  'create_model',
  'image_size',
  'is_slimming',
  'list_models',
  'options_of',
  'resolved_options',
  'size_options',
  'variables_from',
  'variables_of',
]
