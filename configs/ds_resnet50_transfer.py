"""DS-ResNet-50 from ImageNet to CIFAR-10 or CIFAR-100.

    python -m ds_jax.main --config=configs/ds_resnet50_transfer.py \
        --workdir=runs/resnet50_cifar10 --config.dataset.data_dir=DIR

and with --config=configs/ds_resnet50_transfer.py:cifar100 on CIFAR-100. DIR
holds a TFDS copy of the data set as array_record. It starts from the run of
`ds_resnet50.py`; --config.init.checkpoint names another workdir, or a file of
torchvision's weights. Time: not yet run. Expected: not yet run.
"""

import ml_collections


def get_config(dataset: str = 'cifar10') -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  classes = {'cifar10': 10, 'cifar100': 100}
  if dataset not in classes:
    raise KeyError(f'data set {dataset}: expected cifar10 or cifar100')
  config = ml_collections.ConfigDict()
  config.model = dict(name='ds_resnet50', num_classes=classes[dataset])
  config.init = dict(
    checkpoint='runs/ds_resnet50'  # or a weights file
  )
  config.dataset = dict(
    name=dataset,
    image_size=224,  # what the network was trained at
    batch_size=256,
    crop='resized',
    crop_scale=(0.5, 1.0),
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=8,
  )
  config.supernet = dict(
    num_epochs=20.0,
    optimizer=dict(
      learning_rate=0.01, nesterov=True, weight_decay=1e-4, warmup_epochs=5.0
    ),
    ema_decay=0.99,
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=5.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    target_madds=2.2e9,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
