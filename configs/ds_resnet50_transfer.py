"""DS-ResNet-50 from ImageNet to CIFAR-10 or CIFAR-100.

    python -m ds_jax.main --config=configs/ds_resnet50_transfer.py \
        --workdir=runs/resnet50_cifar10 --config.dataset.data_dir=DIR

and with --config=configs/ds_resnet50_transfer.py:cifar100 on CIFAR-100. DIR
holds a TFDS copy of the data set as array_record. It starts from the run of
`ds_resnet50.py`; --config.init.checkpoint names another workdir, or a file of
torchvision's weights. Time: not yet run. Expected: not yet run.
"""

import ml_collections
from ml_collections import config_dict


def get_config(dataset: str = 'cifar10') -> ml_collections.ConfigDict:
  """Returns the experiment: every number that a reader may want to change."""
  classes = {'cifar10': 10, 'cifar100': 100}
  if dataset not in classes:
    raise KeyError(f'data set {dataset}: expected cifar10 or cifar100')
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    name='ds_resnet50',
    num_classes=classes[dataset],
    dropout_rate=0.0,
    dtype='float32',
  )
  config.init = dict(
    checkpoint='runs/ds_resnet50',  # or a weights file
    sort_channels=config_dict.placeholder(str),
  )
  config.dataset = dict(
    name=dataset,
    data_dir='',  # where TFDS copies are; '' means TFDS's own default
    image_size=224,  # what the network was trained at
    batch_size=256,
    crop='resized',
    crop_scale=(0.5, 1.0),
    crop_ratio=1.0,
    flip=True,
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=8,
  )
  config.supernet = dict(
    num_epochs=20.0,
    num_random=2,  # random sub-networks a step, beside widest and narrowest
    ensemble=False,
    multi_view=False,
    optimizer=dict(
      name='sgd',
      learning_rate=0.01,
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      warmup_epochs=5.0,
      clip_norm=config_dict.placeholder(float),
    ),
    ema_decay=0.99,
    label_smoothing=0.1,
    accumulation_steps=1,
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=5.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    target_madds=2.2e9,
    price_rate=0.1,
    hard_images='try_best',
  )
  config.checkpoint = dict(every_steps=1000, keep_last=2, keep_best=1)
  config.parallel = dict(executor='pjit', fsdp=1, heartbeat_seconds=60)
  config.monitor = dict(
    profile_step=config_dict.placeholder(int),  # of a trace; None takes none
    profile_steps=5,
    watchdog_seconds=600.0,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
