"""DS-MobileNet on Fashion-MNIST.

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


def get_config(place: str = 'early_gate') -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  # Blocks of 48 channels; the gate's is the next.
  depths = {'early_gate': 2, 'late_gate': 4}
  if place not in depths:
    raise KeyError(f'place {place}: expected early_gate or late_gate')
  config = ml_collections.ConfigDict()
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
  )
  config.dataset = dict(
    name='idx:/usr/share/datasets/fashion-mnist',
    image_size=28,  # the images' own: resizing would only cost time
    crop_padding=2,
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=12.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    optimizer=dict(
      learning_rate=0.2, nesterov=True, weight_decay=1e-4, warmup_epochs=0.5
    ),
    ema_decay=0.99,
  )
  config.gate = dict(
    num_epochs=3.0,
    target='correctness',  # or 'sandwich', the published one
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    # 61% and 62% of the widest's.
    target_madds={'early_gate': 2.1e6, 'late_gate': 2.4e6}[place],
  )
  config.checkpoint = dict(every_steps=468)
  config.log_every_steps = 100
  config.eval_every_epochs = 2.0
  return config
