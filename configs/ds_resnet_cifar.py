"""DS-ResNet-26 on CIFAR-10 or CIFAR-100, from scratch.

    python -m ds_jax.main --config=configs/ds_resnet_cifar.py \
        --workdir=runs/resnet_cifar10 --config.dataset.data_dir=DIR

and with --config=configs/ds_resnet_cifar.py:cifar100 on CIFAR-100. DIR holds a
TFDS copy of the data set as array_record. Time: not yet run. Expected: not yet
run.
"""

import ml_collections


def get_config(dataset: str = 'cifar10') -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  classes = {'cifar10': 10, 'cifar100': 100}
  if dataset not in classes:
    raise KeyError(f'data set {dataset}: expected cifar10 or cifar100')
  config = ml_collections.ConfigDict()
  config.model = dict(name='ds_resnet26_cifar', num_classes=classes[dataset])
  config.dataset = dict(
    name=dataset,
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=4,
  )
  config.supernet = dict(
    num_epochs=200.0,
    optimizer=dict(nesterov=True, weight_decay=5e-4, warmup_epochs=5.0),
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=10.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    target_madds=24e6,
  )
  config.checkpoint = dict(every_steps=2000)
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
