"""DS-MobileNet for 32-pixel images on CIFAR-10, both stages.

    python -m ds_jax.main --config=configs/ds_mobilenet_cifar10.py \
        --workdir=runs/cifar10 --config.dataset.data_dir=DIR

DIR holds a TFDS copy of cifar10 as array_record. Time and result: not yet run.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: every number that a reader may want to change."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    name='ds_mobilenet_tiny', num_classes=10, dropout_rate=0.0, dtype='float32'
  )
  config.init = dict(
    checkpoint=config_dict.placeholder(str),  # a workdir or a weights file
    sort_channels=config_dict.placeholder(str),
  )
  config.dataset = dict(
    name='cifar10',
    data_dir='',  # where TFDS copies are; '' means TFDS's own default
    image_size=32,
    batch_size=128,
    crop='pad',
    crop_padding=4,
    flip=True,
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=2,
  )
  config.supernet = dict(
    num_epochs=100.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    ensemble=False,
    multi_view=False,  # teacher and students see different views
    optimizer=dict(
      name='sgd',
      learning_rate=0.1,
      momentum=0.9,
      nesterov=True,
      weight_decay=5e-4,
      warmup_epochs=2.0,
      clip_norm=config_dict.placeholder(float),
    ),
    ema_decay=0.997,
    label_smoothing=0.1,
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=10.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=2.5e6,
    hard_images='try_best',
  )
  config.checkpoint = dict(every_steps=2000, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
