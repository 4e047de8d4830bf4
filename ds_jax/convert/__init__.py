"""Weights from elsewhere, as ds_jax models and checkpoints.

    python -m ds_jax.convert --input=FILE --output=DIR

writes a checkpoint that `Predictor.restore("DIR")` loads; FILE holds weights of
the authors' DS-Net, of torchvision's ResNet-50, or of a ViT with timm's or
Hugging Face's names. The functions here do the same in memory, and `from_state`
tells the format by the names.

An ordinary network's weights become the widest network's. Of the narrower ones,
which are leading slices of it, only an order of the channels makes something
(`sort_channels`), and training.
"""

from ds_jax.convert.files import read
from ds_jax.convert.formats import from_state, recognise
from ds_jax.convert.importance import sort_channels
from ds_jax.convert.network import from_network
from ds_jax.convert.official import from_official
from ds_jax.convert.statistics import channel_statistics
from ds_jax.convert.torchvision import from_torchvision_resnet50
from ds_jax.convert.vit import from_timm_vit

__all__ = [
  'channel_statistics',
  'from_network',
  'from_official',
  'from_state',
  'from_timm_vit',
  'from_torchvision_resnet50',
  'read',
  'recognise',
  'sort_channels',
]
