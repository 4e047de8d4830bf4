"""DS-ViT-S/16 on ImageNet: DeiT's recipe, with MvCo.

    python -m ds_jax.main --config=configs/ds_vit_s16.py \
        --workdir=runs/ds_vit_s16 --config.dataset.data_dir=DIR

DIR holds a TFDS copy of imagenet2012 as array_record. From DeiT-S's weights
fewer epochs do: add --config.init.checkpoint=deit_small_patch16_224.pth
--config.init.sort_channels=l1 --config.supernet.num_epochs=100. Time: not yet
run. Expected: not yet run; the widest network is DeiT-S, 79.9 top-1 in its
paper. Mixup and CutMix, which DeiT also uses, are not here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_vit_s16',
    num_classes=1000,
    image_size=224,
    drop_path_rate=0.1,  # stochastic depth, in the widest's pass alone
  )
  config.dataset = dict(
    name='imagenet2012',
    image_size=224,
    batch_size=1024,
    crop='resized',
    crop_ratio=0.875,  # of the short side, in evaluation
    randaugment_layers=2,
    erasing_probability=0.25,
    budget_share=0.02,  # held out of training, to set budgets on
    num_threads=16,
  )
  config.supernet = dict(
    num_epochs=300.0,
    multi_view=True,
    optimizer=dict(
      name='adamw',
      learning_rate=1e-3,
      weight_decay=0.05,
      warmup_epochs=5.0,
      warmup_init=1e-6,
      end_factor=0.01,
      clip_norm=1.0,
    ),
    ema_decay=0.999,
  )
  config.gate = dict(
    num_epochs=10.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    target_madds=2.4e9,
  )
  config.checkpoint = dict(every_steps=2500)
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
