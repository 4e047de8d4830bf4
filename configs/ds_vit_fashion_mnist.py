"""DS-ViT on Fashion-MNIST.

    python -m ds_jax.main --config=configs/ds_vit_fashion_mnist.py \
        --workdir=runs/fashion_vit --config.dataset.name=idx:DIR

DIR holds the four IDX files; on Debian the package `dataset-fashion-mnist`
installs them in the folder that is the default here. Time: 20 to 30 minutes on
2 CPU cores. Expected: 85.6 to 88.0 top-1 from the narrowest to the widest
bucket; routed 87.9 at 56% of the MAdds of the widest, where the hull of
the buckets is at 87.0; a cascade 88.0 at 45% (2026-11-26, seed 0; on another
kind of CPU the same seed gave 85.3 to 87.9, routed 87.6, a cascade 87.9 at
half).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_vit_cifar',
    num_classes=10,
    image_size=28,
    patch_size=7,  # 16 tokens
    drop_path_rate=0.1,  # stochastic depth, in the widest's pass alone
  )
  config.dataset = dict(
    name='idx:/usr/share/datasets/fashion-mnist',
    image_size=28,  # the images' own: resizing would only cost time
    crop_padding=2,
    budget_share=0.06,  # held out of training, to set budgets on
    num_threads=1,
  )
  config.supernet = dict(
    num_epochs=10.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    multi_view=True,  # teacher and students see different views
    optimizer=dict(
      name='adamw',
      learning_rate=2e-3,
      weight_decay=0.05,
      warmup_epochs=0.5,
      warmup_init=1e-6,
      end_factor=0.01,
      clip_norm=1.0,
    ),
    ema_decay=0.99,
  )
  config.gate = dict(
    num_epochs=3.0,
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
    target_madds=5e6,  # 57% of the widest's
  )
  config.checkpoint = dict(every_steps=468)
  config.log_every_steps = 100
  config.eval_every_epochs = 2.0
  return config
