"""DS-MobileNet on Fashion-MNIST, both stages.

    python -m ds_jax.main --config=configs/ds_mobilenet_fashion_mnist.py \
        --workdir=runs/fashion --config.dataset.name=idx:DIR

DIR holds the four IDX files; on Debian the package `dataset-fashion-mnist`
installs them in the folder that is the default here. Time: about 35 minutes on
2 CPU cores, by its pace. Expected: 90.4 to 91.5 top-1 from the narrowest to the
widest bucket; the gate 91.4 at 59% of the MAdds of the widest, where the hull
of the buckets is at 91.0; a cascade 91.5 at 30% (2026-11-24, with
--config.seed=2 --config.dataset.gate_share=0.1).

With :late_gate after the file's name, the gate comes two blocks later: buckets
from 22% of the MAdds of the widest on, 90.2 to 90.9 top-1; the gate and a
cascade 90.9 at half (2026-11-26, with --config.dataset.gate_share=0.1).
"""

import ml_collections
from ml_collections import config_dict


def get_config(place: str = 'early_gate') -> ml_collections.ConfigDict:
  """Returns the experiment: every number that a reader may want to change."""
  # Blocks of 48 channels; the gate's is the next.
  depths = {'early_gate': 2, 'late_gate': 4}
  if place not in depths:
    raise KeyError(f'place {place}: expected early_gate or late_gate')
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    name='ds_mobilenet_tiny',
    num_classes=10,
    stages=(
      dict(widths=(32,)),
      dict(widths=(48,), depth=depths[place], stride=2),
      dict(widths=(16, 48, 88, 128), depth=3),
      dict(widths=(32, 88, 144, 192), depth=2, stride=2),
    ),
    gate_head='own',  # or 'shared', the published one
    gate_hidden=(64, 64),
    gate_pooling='mean_max_std',
    dropout_rate=0.0,
    dtype='float32',
  )
  config.init = dict(
    checkpoint=config_dict.placeholder(str),  # a workdir or a weights file
    sort_channels=config_dict.placeholder(str),
  )
  config.dataset = dict(
    name='idx:/usr/share/datasets/fashion-mnist',
    data_dir='',  # of TFDS copies; idx:DIR has its own
    image_size=28,  # the images' own: resizing would only cost time
    batch_size=128,
    crop='pad',
    crop_padding=2,
    flip=True,
    gate_share=0.0,  # held out of Stage I, for gate.part='gate'
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=12.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    ensemble=False,
    multi_view=False,  # teacher and students see different views
    optimizer=dict(
      name='sgd',
      learning_rate=0.2,
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      warmup_epochs=0.5,
      clip_norm=config_dict.placeholder(float),
    ),
    ema_decay=0.99,
    label_smoothing=0.1,
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=50)
  config.gate = dict(
    part='train',  # or 'gate', the images held out
    is_augmented=True,
    num_epochs=3.0,
    target='correctness',  # or 'sandwich', the published one
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    # 61% and 62% of the widest's.
    target_madds={'early_gate': 2.1e6, 'late_gate': 2.4e6}[place],
    price_rate=0.1,
    hard_images='try_best',
    balances_labels=False,
  )
  config.checkpoint = dict(every_steps=468, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 2.0
  return config
