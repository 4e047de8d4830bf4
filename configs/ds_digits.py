"""DS-MobileNet on scikit-learn's digits, both stages: a run of minutes.

    python -m ds_jax.main --config=configs/ds_digits.py --workdir=runs/digits

Time: some 90 seconds on 2 CPU cores, most of it compilation. Expected: 96.1 to
97.8 top-1 from the narrowest to the widest bucket; the gate 97.5 at 45% of the
MAdds of the widest, a cascade 98.1 at 40% (2026-11-27, seed 0, this command;
another kind of CPU rounds otherwise, and ends elsewhere). There are 360 test
images, and one is 0.3 points: `ds_mobilenet_fashion_mnist.py` shows better what
a gate is good for.
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
    name='digits',
    data_dir='',  # of TFDS copies; the embedded data need none
    image_size=32,
    batch_size=64,
    crop='pad',
    crop_padding=2,
    flip=False,
    budget_share=0.35,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=10.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    ensemble=False,
    multi_view=False,  # teacher and students see different views
    optimizer=dict(
      name='sgd',
      learning_rate=0.1,
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      warmup_epochs=1.0,
      clip_norm=config_dict.placeholder(float),
    ),
    ema_decay=0.98,
    label_smoothing=0.1,
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=20)
  config.gate = dict(
    num_epochs=30.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=2e6,
    price_rate=0.1,
    hard_images='try_best',
  )
  config.checkpoint = dict(every_steps=200, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 50
  config.eval_every_epochs = 10.0
  return config
