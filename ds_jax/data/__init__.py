"""Images from disk to batches: sources, decoding, transforms, pipeline."""

from ds_jax.data.decoding import ImageError, Picture
from ds_jax.data.pipeline import (
  BadImages,
  Batch,
  channel_statistics,
  dataset_info,
  eval_batches,
  load_part,
  load_split,
  normalizer,
  num_eval_batches,
  num_images,
  train_batches,
)
from ds_jax.data.source import DatasetNotFoundError, Example, Source
from ds_jax.data.sources import DatasetInfo, load_source
from ds_jax.data.transforms import for_evaluation, normalize

__all__ = [
  'BadImages',
  'Batch',
  'DatasetInfo',
  'DatasetNotFoundError',
  'Example',
  'ImageError',
  'Picture',
  'Source',
  'channel_statistics',
  'dataset_info',
  'eval_batches',
  'for_evaluation',
  'load_part',
  'load_source',
  'load_split',
  'normalize',
  'normalizer',
  'num_eval_batches',
  'num_images',
  'train_batches',
]
