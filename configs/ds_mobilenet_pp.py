"""DS-MobileNet++ on ImageNet: widths, and 3 x 3 or 5 x 5 depthwise kernels.

    python -m ds_jax.main --config=configs/ds_mobilenet_pp.py \
        --workdir=runs/ds_mobilenet_pp --config.dataset.data_dir=DIR

DIR holds a TFDS copy of imagenet2012 as array_record. Time: not yet run.
Expected: not yet run; the slice lists are ours, and the paper has no figure for
them. The recipe is that of `ds_mobilenet.py` but for what is ours: rates that
change with every step, no cool-down, a target for the MAdds, images held out
for budgets, and RandAugment whose severities rise with the magnitude.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: every number that a reader may want to change."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    name='ds_mobilenet_pp', num_classes=1000, dropout_rate=0.2, dtype='float32'
  )
  config.init = dict(
    checkpoint=config_dict.placeholder(str),  # a workdir or a weights file
    sort_channels=config_dict.placeholder(str),
  )
  config.dataset = dict(
    name='imagenet2012',
    data_dir='',  # where TFDS copies are; '' means TFDS's own default
    image_size=224,
    batch_size=512,
    crop='resized',
    crop_scale=(0.08, 1.0),
    crop_ratio=0.875,  # of the short side, in evaluation
    flip=True,
    randaugment_layers=2,
    randaugment_magnitude=9.0,
    erasing_probability=0.2,
    budget_share=0.02,  # held out of training, to set budgets on
    num_threads=16,
  )
  config.supernet = dict(
    num_epochs=150.0,
    num_random=2,  # random sub-networks a step, beside widest and narrowest
    ensemble=False,
    multi_view=False,  # teacher and students see different views
    optimizer=dict(
      name='sgd',
      learning_rate=0.08,
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      warmup_epochs=5.0,
      warmup_init=1e-5,
      clip_norm=config_dict.placeholder(float),
    ),
    ema_decay=0.997,
    label_smoothing=0.1,
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=30.0,
    optimizer=dict(
      name='sgd', learning_rate=0.08, momentum=0.9, weight_decay=0.01
    ),
    sandwich_weight=1.0,
    routed_weight=1.0,
    madds_weight=0.5,  # used without a target, in units of 1e9 MAdds
    target_madds=300e6,
    hard_images='try_best',
    label_smoothing=0.1,
  )
  config.checkpoint = dict(every_steps=2500, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
