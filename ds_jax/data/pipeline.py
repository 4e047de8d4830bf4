"""Batches for training and evaluation, from a source by name.

What a training batch holds depends on (seed, step) alone: not on threads, not
on where a run was resumed. Processes share each global batch: together they
read the images that one process would. Which images are held out never changes.
Their order is Grain's, and what augmentation draws a NumPy Generator's, which
other versions may change: hosts compare versions, and a resumed run says which
are new (`hosts.versions`).

Axes: N images of one process's share of a batch, S side of an image.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from PIL import Image

from ds_jax import config as config_lib
from ds_jax.data import augment, decoding, sources, transforms
from ds_jax.data import source as source_lib

Batch = dict[str, np.ndarray]

# Endless, as far as a training run goes.
_MANY_STEPS = 1 << 40

PARTS = ('test', 'train', 'gate', 'budget')
# What a batch calls the first and the second view.
_VIEWS = {1: ('images',), 2: ('images', 'teacher_images')}


class BadImages:
  """The images that could not be read, for those who skip them.

  Each is named in the log once. Threads may share it.
  """

  def __init__(self):
    self._names: set[str] = set()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._names)

  def add(self, error: decoding.ImageError) -> None:
    """Notes one, by its error, which names it."""
    with self._lock:
      if str(error) in self._names:
        return
      self._names.add(str(error))
    logging.warning('Skipped: %s', error)


def load_split(config: config_lib.DataConfig, split: str) -> source_lib.Source:
  """Opens the `train` or the `test` split; see `sources.load_source`."""
  return sources.load_source(
    config.name,
    split,
    config.data_dir,
    test_share=config.test_share,
    drop_copies=config.drop_copies,
  )


def dataset_info(config: config_lib.DataConfig) -> sources.DatasetInfo:
  """Describes a data set that is on disk; see `sources.dataset_info`."""
  return sources.dataset_info(
    config.name,
    config.data_dir,
    test_share=config.test_share,
    drop_copies=config.drop_copies,
  )


def channel_statistics(
  config: config_lib.DataConfig,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and deviation that images are normalised by, as configured."""
  mean, std = sources.channel_statistics(config.name)
  return config.mean or mean, config.std or std


def normalizer(
  config: config_lib.DataConfig,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that takes a data set's pixels to a model's floats."""
  mean, std = channel_statistics(config)
  return functools.partial(transforms.normalize, mean=mean, std=std)


def load_part(config: config_lib.DataConfig, part: str) -> source_lib.Source:
  """Opens the test split, or one of the disjoint parts of the train split.

  Which images are held out depends on the shares alone, not on a seed.

  Args:
    config: what to read.
    part: 'test', 'train', 'gate' or 'budget'.

  Returns:
    The images; 'train' is what the shares leave over.

  Raises:
    ValueError: for another part, or one without images.
  """
  if part not in PARTS:
    raise ValueError(f'Unknown part {part!r}; known: {PARTS}.')
  if part == 'test':
    test = load_split(config, 'test')
    if not len(test):
      raise ValueError(
        f'The test split of {config.name!r} is empty: nothing can be evaluated'
        ' on it. Put images there.'
      )
    return test
  source = load_split(config, 'train')
  if not config.gate_share and not config.budget_share and part == 'train':
    return source
  gate = round(config.gate_share * len(source))
  budget = gate + round(config.budget_share * len(source))
  ranges = {
    'gate': slice(gate),
    'budget': slice(gate, budget),
    'train': slice(budget, None),
  }
  # RandomState's stream is frozen for good; default_rng's is not.
  order = np.random.RandomState(0).permutation(len(source))
  indices = np.sort(order[ranges[part]])
  if not len(indices):
    raise ValueError(
      f'The {part} part of {config.name!r} is empty: gate_share is'
      f' {config.gate_share} and budget_share {config.budget_share} of'
      f' {len(source)} images.'
    )
  return source_lib.Subset(source, indices)


def num_images(config: config_lib.DataConfig) -> dict[str, int]:
  """Returns how many images there are in each part that the shares make.

  Args:
    config: what to read.

  Raises:
    DatasetNotFoundError: as `load_source`.
    ValueError: as `load_part`.
  """
  held_out = {'gate': config.gate_share, 'budget': config.budget_share}
  parts = [part for part in PARTS if held_out.get(part, 1)]
  return {part: len(load_part(config, part)) for part in parts}


def train_batches(
  config: config_lib.DataConfig,
  *,
  seed: int,
  part: str = 'train',
  is_augmented: bool = True,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_views: int = 1,
  bad_images: BadImages | None = None,
) -> Iterator[Batch]:
  """Endless shuffled, augmented batches; every epoch has a new order.

  Epochs follow each other without a gap, so a batch may end one and begin the
  next. With `num_repeats` R, a batch is R times the same batch_size / R images,
  each time augmented anew. The copies are as far apart as can be, most of them
  on other devices and in other micro-batches.

  Args:
    config: what to read.
    seed: of order and augmentation.
    part: as in `load_part`.
    is_augmented: whether images are augmented, or as for evaluation, when none
      is repeated.
    start_step: the first batch given; resuming costs nothing.
    process_index: this process reads the process_index-th part of each global
      batch.
    process_count: how many processes share a batch.
    num_views: 1, or 2 for multi-view consistency: every image is augmented
      twice, independently. The first view is the same with either.
    bad_images: notes those that are skipped (`DataConfig.on_bad_image`). The
      next image of the source that can be read takes the place of one.

  Returns:
    An iterator over {'images': uint8 (N, S, S, 3), 'labels': int32 (N,)}, N =
    batch_size / process_count; of two views, the second is 'teacher_images',
    uint8 (N, S, S, 3). Its `close()` stops the threads.

  Raises:
    ValueError: if the batch does not divide among the processes, or is larger
      than the part, or if num_views is neither 1 nor 2.
    ImageError: from the iterator, for an image that can't be read.
  """
  if num_views not in _VIEWS:
    raise ValueError(f'num_views {num_views!r} is neither 1 nor 2.')
  source = load_part(config, part)
  local_size = _local_batch_size(config, process_index, process_count)
  if config.batch_size > len(source):
    raise ValueError(
      f'batch_size {config.batch_size} is larger than the {part} part of'
      f' {config.name!r} with {len(source)} images.'
    )
  # Grain seeds epoch e with seed + e: unmixed, seed 1 would be seed 0 one
  # epoch on.
  mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  read = _Reader(config, source, bad_images)

  def training_example(index: int, rng: np.random.Generator) -> dict[str, Any]:
    def views(example):
      return _training_example(config, num_views, is_augmented, example, rng)

    for candidate in itertools.chain(range(index, len(source)), range(index)):
      found = read(candidate, views)
      if found is not None:
        return found
    raise ValueError(f'No image of the {part} part of {config.name!r} is good.')

  order = grain.MapDataset.range(len(source)).shuffle(seed=mixed_seed).repeat()
  if is_augmented and config.num_repeats > 1:
    order = _repeated(order, config)
  dataset = order.random_map(training_example, seed=mixed_seed)

  def load_rows(step: int, rows: range) -> Batch:
    # Rows of the global batch, which is the same for any number of processes.
    start = step * config.batch_size + process_index * local_size
    examples = [dataset[start + i] for i in rows]
    return {
      name: np.stack([example[name] for example in examples])
      for name in examples[0]
    }

  return _iterate(
    load_rows, range(start_step, _MANY_STEPS), local_size, config, num_views
  )


def eval_batches(
  config: config_lib.DataConfig,
  part: str = 'test',
  *,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  bad_images: BadImages | None = None,
) -> Iterator[Batch]:
  """Every image of a part once, in order, in batches of one shape.

  Args:
    config: what to read.
    part: as in `load_part`.
    start_step: the first batch given.
    process_index: this process reads the process_index-th part of each global
      batch.
    process_count: how many processes share a batch.
    bad_images: notes those that are skipped (`DataConfig.on_bad_image`).

  Returns:
    An iterator over `num_eval_batches` of {'images': uint8 (N, S, S, 3),
    'labels': int32 (N,), 'mask': bool (N,)}, N = batch_size / process_count.
    The mask is False, and all else zero, where an image is skipped and where
    the last batch is filled up. `close()` stops the threads.

  Raises:
    ValueError: if the batch does not divide among the processes.
    ImageError: from the iterator, for an image that can't be read.
  """
  source = load_part(config, part)
  local_size = _local_batch_size(config, process_index, process_count)
  read = _Reader(config, source, bad_images)

  def load_rows(step: int, rows: range) -> Batch:
    start = step * config.batch_size + process_index * local_size
    return _masked_batch(
      [
        read(start + i, lambda example: _evaluated(config, example))
        if start + i < len(source)
        else None
        for i in rows
      ],
      config,
    )

  steps = range(start_step, _num_batches(source, config))
  return _iterate(load_rows, steps, local_size, config)


def num_eval_batches(config: config_lib.DataConfig, part: str = 'test') -> int:
  """How many batches `eval_batches` gives, the same on every process.

  Args:
    config: what to read.
    part: as in `load_part`.

  Returns:
    The size of the part over the global batch size, rounded up.
  """
  return _num_batches(load_part(config, part), config)


def _num_batches(
  source: source_lib.Source, config: config_lib.DataConfig
) -> int:
  return -(-len(source) // config.batch_size)


def _repeated(
  order: grain.MapDataset, config: config_lib.DataConfig
) -> grain.MapDataset:
  """Returns an order in which the parts of a batch are the same images."""
  num_images = config.batch_size // config.num_repeats

  def index_at(place: int) -> int:
    step, row = divmod(place, config.batch_size)
    return order[step * num_images + row % num_images]

  return grain.MapDataset.range(_MANY_STEPS).map(index_at)


def _local_batch_size(
  config: config_lib.DataConfig, process_index: int, process_count: int
) -> int:
  """One process's share of the global batch."""
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index {process_index} is not in 0 .. {process_count - 1}.'
    )
  if config.batch_size % process_count:
    raise ValueError(
      f'batch_size {config.batch_size} does not divide among {process_count}'
      ' processes.'
    )
  return config.batch_size // process_count


def _training_example(
  config: config_lib.DataConfig,
  num_views: int,
  is_augmented: bool,
  example: source_lib.Example,
  rng: np.random.Generator,
) -> dict[str, Any]:
  """One training example, named as in a batch."""

  def view(image):
    if is_augmented:
      return _augment(config, image, rng)
    return for_evaluation(config, image)

  views = {name: view(example['image']) for name in _VIEWS[num_views]}
  return {**views, 'labels': np.int32(example['label'])}


def _augment(
  config: config_lib.DataConfig, image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """One view of a training image; what is off draws nothing."""
  image = _crop(config, image, rng)
  if config.flip:
    image = transforms.random_flip(image, rng)
  if config.randaugment_layers:
    image = augment.rand_augment(
      image,
      rng,
      config.randaugment_layers,
      config.randaugment_magnitude,
      config.randaugment_increasing,
    )
  if config.color_jitter:
    image = augment.color_jitter(image, rng, config.color_jitter)
  if config.erasing_probability:
    normal = config.erasing_noise == 'normal'
    image = augment.random_erasing(
      image,
      rng,
      config.erasing_probability,
      channel_statistics(config) if normal else None,
    )
  return image


def _crop(
  config: config_lib.DataConfig, image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Brings a training image to size by the configured crop."""
  size = config.image_size
  if config.crop == 'resized':
    return transforms.random_resized_crop(
      image,
      rng,
      size,
      config.crop_scale,
      interpolation=config.interpolation,
    )
  image = for_evaluation(config, image)
  if config.crop == 'pad':
    image = transforms.random_crop(image, rng, config.crop_padding)
  return image


def for_evaluation(
  config: config_lib.DataConfig, image: np.ndarray
) -> np.ndarray:
  """Brings an image to the configured size; see `transforms`."""
  return transforms.for_evaluation(
    image, config.image_size, config.crop_ratio, config.interpolation
  )


class _Reader:
  """Gives examples of a source to a function of them, where they can be read.

  Pictures lie on the configured background.
  """

  def __init__(
    self,
    config: config_lib.DataConfig,
    source: source_lib.Source,
    bad_images: BadImages | None,
  ):
    self._config, self._source = config, source
    self._bad_images = BadImages() if bad_images is None else bad_images

  def __call__(
    self, index: int, function: Callable[[source_lib.Example], Any]
  ) -> Any:
    """Returns what the function does, or None where the image is skipped."""
    try:
      example = self._source[index]
      image = self._as_read(example['image'], index)
      return function({**example, 'image': image})
    except decoding.ImageError as error:
      if self._config.on_bad_image == 'raise':
        raise decoding.ImageError(
          f"{error} Mend it, or set dataset.on_bad_image='skip'."
        ) from error
      self._bad_images.add(error)
      return None

  def _as_read(self, image: Any, index: int) -> np.ndarray | decoding.Picture:
    background = tuple(self._config.background)
    if isinstance(image, decoding.Picture):
      return dataclasses.replace(image, background=background)
    if isinstance(image, Image.Image):
      return decoding.rgb(image, background)
    shape, dtype = np.shape(image), getattr(image, 'dtype', None)
    if dtype == np.uint8 and len(shape) == 3 and shape[-1] == 3:
      return image
    raise ValueError(
      f'Image {index} of {self._source!r} is a {type(image).__name__} of shape'
      f' {shape} and dtype {dtype}: expected uint8 (H, W, 3) in 0 .. 255, an'
      ' image of Pillow, or a ds_jax.data.Picture.'
    )


def _evaluated(
  config: config_lib.DataConfig, example: source_lib.Example
) -> source_lib.Example:
  image = for_evaluation(config, example['image'])
  return source_lib.Example(image=image, label=example['label'])


def _masked_batch(
  examples: list[source_lib.Example | None], config: config_lib.DataConfig
) -> Batch:
  """Stacks examples for evaluation; None is masked zeros."""
  size = config.image_size
  images = np.zeros((len(examples), size, size, 3), np.uint8)
  labels = np.zeros(len(examples), np.int32)
  for i, example in enumerate(examples):
    if example is not None:
      images[i], labels[i] = example['image'], example['label']
  mask = np.array([example is not None for example in examples])
  return {'images': images, 'labels': labels, 'mask': mask}


def _iterate(
  load_rows: Callable[[int, range], Batch],
  steps: range,
  local_size: int,
  config: config_lib.DataConfig,
  num_views: int = 1,
) -> Iterator[Batch]:
  """Reads ahead by threads, which end with the iterator.

  Each thread prepares some rows of a batch, so that all work on the next one.

  Args:
    load_rows: takes a step, and which rows of its batch, to these rows.
    steps: of the batches.
    local_size: rows of a batch.
    config: how far to read ahead, by how many threads.
    num_views: images of a row.
  """
  num_pieces = max(1, min(config.num_threads, local_size))
  bounds = [local_size * i // num_pieces for i in range(num_pieces + 1)]

  def load_piece(index: int) -> Batch:
    step, i = divmod(index, num_pieces)
    return load_rows(steps[step], range(bounds[i], bounds[i + 1]))

  bytes_of_row = 3 * config.image_size**2 * num_views
  bytes_of_piece = max(bytes_of_row * local_size // num_pieces, 1)
  pieces_ahead = min(
    (config.read_ahead_mib << 20) // bytes_of_piece,
    2 * config.num_threads * num_pieces,
  )
  options = grain.ReadOptions(
    num_threads=config.num_threads,
    # Not Grain's default, which keeps 500 elements, here pieces of a batch.
    prefetch_buffer_size=max(pieces_ahead, num_pieces)
    * (config.num_threads > 0),
  )
  pieces = grain.MapDataset.range(len(steps) * num_pieces).map(load_piece)
  iterator = iter(pieces.to_iter_dataset(options))
  try:
    for first in iterator:
      rest = itertools.islice(iterator, num_pieces - 1)
      yield _joined([first, *rest])
  finally:
    iterator.close()


def _joined(pieces: list[Batch]) -> Batch:
  if len(pieces) == 1:
    return pieces[0]
  return {
    name: np.concatenate([piece[name] for piece in pieces])
    for name in pieces[0]
  }
