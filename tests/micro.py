"""An experiment of seconds: 8-pixel random images, both stages.

Also a config file: `--config=tests/micro.py --config.dataset.name=idx:DIR`.
"""

import pathlib
import struct

import ml_collections
import numpy as np
from flax import serialization
from ml_collections import config_dict

from ds_jax import checkpoint, models, routing

MODEL = dict(
  name='ds_mobilenet',
  num_classes=3,
  stem_widths=(4, 6),
  stages=(
    dict(widths=(4, 8)),
    dict(widths=(4, 6, 8), depth=2, stride=2),
    dict(widths=(6, 8, 12)),
  ),
  gate_stage=1,
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment, without its images."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(MODEL, dropout_rate=0.1, dtype='float32')
  config.dataset = dict(
    name='idx',
    image_size=8,
    batch_size=16,
    crop_padding=1,
    gate_share=0.0,
    budget_share=0.0,
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=8.0,
    num_random=1,
    ensemble=False,
    optimizer=dict(
      name='sgd', learning_rate=0.05, weight_decay=1e-4, clip_norm=5.0
    ),
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=40)
  config.gate = dict(
    num_epochs=8.0,
    optimizer=dict(name='adamw', learning_rate=0.01),
    target_madds=4e3,
    price_rate=0.05,
  )
  config.checkpoint = dict(every_steps=7, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 1
  config.eval_every_epochs = 2.0
  return config


def write_images(folder: pathlib.Path, num_train: int = 80) -> str:
  """Writes images that a network can learn, 40 to test; returns their name."""
  generator = np.random.default_rng(0)
  for prefix, count in (('train', num_train), ('t10k', 40)):
    labels = generator.integers(0, 3, count).astype(np.uint8)
    images = generator.integers(0, 100, (count, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
      image[:, 3 * label : 3 * label + 2] += 120
    write_idx(folder / f'{prefix}-images-idx3-ubyte', images)
    write_idx(folder / f'{prefix}-labels-idx1-ubyte', labels)
  return f'idx:{folder}'


def write_idx(path: pathlib.Path, array: np.ndarray):
  header = struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
  path.write_bytes(header + array.tobytes())


def save_finished_run(folder: pathlib.Path, **meta) -> None:
  """Writes the last checkpoint of a run, without the run."""
  rng = np.random.default_rng(0)
  state = {
    'network': models.variables_of(models.create_model(**MODEL)),
    'outcomes': routing.observe(
      rng.normal(size=(200, 3)).astype(np.float32),
      rng.normal(size=(200, 3, 3)).astype(np.float32),
      rng.integers(0, 3, 200),
    ),
  }
  meta = {
    'phase': 'held_out', 'model': MODEL, 'image_size': 8,
    'crop_ratio': 1.0, 'mean': (0.5,) * 3, 'std': (0.5,) * 3,
    'interpolation': 'bilinear', 'has_gate': True,
    'gate_target': {'target': 'sandwich', 'target_madds': 4e3}, **meta,
  }  # fmt: skip
  with checkpoint.Checkpointer(checkpoint.directory_of(folder)) as saver:
    saver.save(1, serialization.to_state_dict(state), meta)
