"""DS-MobileNet on scikit-learn's digits: a run of minutes.

    python -m ds_jax.main --config=configs/ds_digits.py --workdir=runs/digits

Time: 90 seconds to 3 minutes on 2 CPU cores, most of it compilation. Expected:
96.1 to 97.8 top-1 from the narrowest to the widest bucket; the gate 97.5 at 45%
of the MAdds of the widest, a cascade 98.1 at 40% (2026-11-27, seed 0, this
command; another kind of CPU rounds otherwise, and ends elsewhere). There are
360 test images, and one is 0.3 points: `ds_mobilenet_fashion_mnist.py` shows
better what a gate is good for.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(name='ds_mobilenet_tiny', num_classes=10)
  config.dataset = dict(
    name='digits',
    batch_size=64,
    crop_padding=2,
    flip=False,
    budget_share=0.35,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=10.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    optimizer=dict(nesterov=True, weight_decay=1e-4, warmup_epochs=1.0),
    ema_decay=0.98,
  )
  config.calibrate = dict(num_batches=20)
  config.gate = dict(
    num_epochs=30.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=2e6,
  )
  config.checkpoint = dict(every_steps=200)
  config.eval_every_epochs = 10.0
  return config
