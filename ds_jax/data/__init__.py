"""Images from disk to batches: sources, transforms, pipeline."""

from ds_jax.data.pipeline import (
  Batch,
  eval_batches,
  load_part,
  num_eval_batches,
  num_images,
  train_batches,
)
from ds_jax.data.sources import (
  DatasetInfo,
  DatasetNotFoundError,
  Example,
  Source,
  channel_statistics,
  dataset_info,
  load_source,
  normalizer,
)
from ds_jax.data.transforms import for_evaluation, normalize

__all__ = [
  'Batch',
  'DatasetInfo',
  'DatasetNotFoundError',
  'Example',
  'Source',
  'channel_statistics',
  'dataset_info',
  'eval_batches',
  'for_evaluation',
  'load_part',
  'load_source',
  'normalize',
  'normalizer',
  'num_eval_batches',
  'num_images',
  'train_batches',
]
