"""DS-ViT-S/16 from ImageNet to CIFAR-10 or CIFAR-100, with MvCo.

    python -m ds_jax.main --config=configs/ds_vit_s16_transfer.py \
        --workdir=runs/vit_s16_cifar10 --config.dataset.data_dir=DIR

and with --config=configs/ds_vit_s16_transfer.py:cifar100 on CIFAR-100. DIR
holds a TFDS copy of the data set as array_record. It starts from the run of
`ds_vit_s16.py`; --config.init.checkpoint names another workdir, or a file of
DeiT's or timm's weights. Time: not yet run. Expected: not yet run.
"""

import ml_collections


def get_config(dataset: str = 'cifar10') -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  classes = {'cifar10': 10, 'cifar100': 100}
  if dataset not in classes:
    raise KeyError(f'data set {dataset}: expected cifar10 or cifar100')
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_vit_s16',
    num_classes=classes[dataset],
    image_size=224,
    drop_path_rate=0.1,  # stochastic depth, in the widest's pass alone
  )
  config.init = dict(
    checkpoint='runs/ds_vit_s16'  # or a weights file
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
    multi_view=True,
    optimizer=dict(
      name='adamw',
      learning_rate=1e-4,
      weight_decay=0.05,
      warmup_epochs=5.0,
      warmup_init=1e-6,
      end_factor=0.01,
      clip_norm=1.0,
    ),
    ema_decay=0.99,
  )
  config.gate = dict(
    num_epochs=5.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    target_madds=2.4e9,
  )
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
