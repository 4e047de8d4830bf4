"""DS-MobileNet for 32-pixel images on CIFAR-10.

    python -m ds_jax.main --config=configs/ds_mobilenet_cifar10.py \
        --workdir=runs/cifar10 --config.dataset.data_dir=DIR

DIR holds a TFDS copy of cifar10 as array_record. Time and result: not yet run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(name='ds_mobilenet_tiny', num_classes=10)
  config.dataset = dict(
    name='cifar10',
    budget_share=0.06,  # held out of training, to set budgets on
  )
  config.supernet = dict(
    num_epochs=100.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    optimizer=dict(nesterov=True, weight_decay=5e-4, warmup_epochs=2.0),
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=10.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=2.5e6,
  )
  config.checkpoint = dict(every_steps=2000)
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
