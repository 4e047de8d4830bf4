"""DS-ResNet-26 on scikit-learn's digits: a run of minutes.

    python -m ds_jax.main --config=configs/ds_digits_resnet.py \
        --workdir=runs/digits_resnet

Time: 4 minutes on 2 CPU cores, beside another run. Expected: 96.1 to 98.9 top-1
from the narrowest to the widest bucket; routed 98.3 at 47% of the MAdds of the
widest (measured by this command, 2026-11-24, seed 0). There are 360 test
images, and one is 0.3 points.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_resnet26_cifar',
    num_classes=10,
    stem=dict(widths=(32,), kernel_size=3, stride=2, pool=False),
  )
  config.dataset = dict(
    name='digits',
    batch_size=64,
    crop_padding=2,
    flip=False,
    budget_share=0.2,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=12.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    optimizer=dict(nesterov=True, weight_decay=1e-4, warmup_epochs=1.0),
    ema_decay=0.98,
  )
  config.calibrate = dict(num_batches=20)
  config.gate = dict(
    num_epochs=19.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=6e6,
  )
  config.checkpoint = dict(every_steps=200)
  config.eval_every_epochs = 10.0
  return config
