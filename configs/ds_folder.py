"""DS-MobileNet on a folder of pictures of one's own: small, and a start.

    python -m ds_jax.main --config=configs/ds_folder.py --workdir=runs/mine \
        --config.dataset.name=imagefolder:DIR
    python -m ds_jax.predict --workdir=runs/mine --fraction=0.5 PICTURES...

DIR holds a folder of pictures for each class, or `train` and `val` with such
folders each. For larger pictures set `--config.dataset.image_size`. Where there
are few, start from trained weights: with `--config.model.num_classes=None`
`ds_resnet50_transfer.py` and `ds_vit_s16_transfer.py` take a folder, too.
Time and results on clip art: `docs/data.md`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_mobilenet_tiny',
    num_classes=None,  # as many as there are folders
    stages=(
      dict(widths=(32,)),
      dict(widths=(48,), depth=2, stride=2),
      dict(widths=(24, 64, 112, 160), depth=3, stride=2),
      dict(widths=(48, 112, 192, 256), depth=2, stride=2),
    ),
    gate_head='own',
    gate_hidden=(64, 64),
    gate_pooling='mean_max_std',
  )
  config.dataset = dict(
    name='imagefolder:DIR',
    image_size=48,
    crop='resized',
    crop_scale=(0.35, 1.0),
    color_jitter=0.2,
    budget_share=0.1,  # held out of training, to set budgets on
    on_bad_image='skip',  # each is named in the log
  )
  config.supernet = dict(
    num_epochs=16.0,
    num_random=1,  # random sub-networks a step, beside widest and narrowest
    optimizer=dict(nesterov=True, weight_decay=1e-4, warmup_epochs=1.0),
    ema_decay=0.99,
  )
  config.gate = dict(
    num_epochs=6.0,
    target='correctness',
    target_fraction=0.6,  # of the largest bucket's MAdds
    optimizer=dict(name='adamw', learning_rate=0.01, end_factor=0.1),
  )
  config.checkpoint = dict(every_steps=200)
  config.eval_every_epochs = 4.0
  return config
