"""DS-ViT-S/16 on ImageNet: DeiT's recipe, with MvCo.

    python -m ds_jax.main --config=configs/ds_vit_s16.py \
        --workdir=runs/ds_vit_s16 --config.dataset.data_dir=DIR

DIR holds a TFDS copy of imagenet2012 as array_record. From DeiT-S's weights
fewer epochs do: add --config.init.checkpoint=deit_small_patch16_224.pth
--config.init.sort_channels=l1 --config.supernet.num_epochs=100. Time: not yet
run. Expected: not yet run; the widest network is DeiT-S, 79.9 top-1 in its
paper.

A comment names where a number is from in DeiT's repository,
github.com/facebookresearch/deit at 0282d2a, with timm 0.3.2. More of its
numbers are our defaults: the crop's scale and the flip, RandAugment's magnitude
of 9 and that it is increasing (--aa: m9, inc1), --mixup-prob of 1,
--mixup-switch-prob of 0.5 and --smoothing of 0.1. Its --color-jitter of 0.4
does nothing, since timm leaves it out where there is an --aa; nor do its
--cooldown-epochs, since main.py ends after --epochs. What differs:

* A batch has 960 images, not 1,024, which can't hold all of them three times;
  the learning rate is scaled as DeiT's is.
* An epoch goes on with the images that the one before did not have, where
  RASampler draws anew. All three copies of an image are mixed with those of
  one other; DeiT's, on different GPUs, with those of several.
* timm's rates come an epoch later, the first of them twice.
* The moving average is the teacher of the sub-networks, and has to follow: its
  decay is 0.999, after a warm-up, not 0.99996.
* The gradient is a sum over the sub-networks of a step, and is clipped.
* Mixtures are of the first views, for the students, and alike of the second,
  for the teacher. Stochastic depth is in the widest's pass alone.
* Stage II, which DeiT has not, sees images as in inference: which of them are
  easy is not told by mixtures.
* Some images are held out of training, to set budgets on.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_vit_s16',
    num_classes=1000,
    image_size=224,  # main.py: --input-size
    init='truncated_normal',  # timm/models/vision_transformer.py
    drop_path_rate=0.1,  # main.py: --drop-path
  )
  batch_size = 960
  learning_rate = 5e-4 * batch_size / 512  # main.py: --lr, linear_scaled_lr
  config.dataset = dict(
    name='imagenet2012',
    image_size=224,  # main.py: --input-size
    batch_size=batch_size,
    crop='resized',  # timm/data/transforms_factory.py
    crop_ratio=0.875,  # datasets.py: 256 / 224, in evaluation
    interpolation='bicubic',  # main.py: --train-interpolation; datasets.py
    randaugment_layers=2,  # main.py: --aa; timm/data/auto_augment.py
    erasing_probability=0.25,  # main.py: --reprob
    erasing_noise='normal',  # main.py: --remode
    mixup_alpha=0.8,  # main.py: --mixup
    cutmix_alpha=1.0,  # main.py: --cutmix
    num_repeats=3,  # main.py: --repeated-aug; samplers.py
    budget_share=0.02,  # held out of training, to set budgets on
    num_threads=16,
  )
  config.supernet = dict(
    num_epochs=300.0,  # main.py: --epochs
    multi_view=True,
    optimizer=dict(
      name='adamw',  # main.py: --opt
      learning_rate=learning_rate,
      weight_decay=0.05,  # main.py: --weight-decay
      warmup_epochs=5.0,  # main.py: --warmup-epochs
      warmup_init=1e-6,  # main.py: --warmup-lr
      end_factor=1e-5 / learning_rate,  # main.py: --min-lr
      by_epoch=True,  # main.py: --sched; timm/scheduler/cosine_lr.py
      clip_norm=1.0,
    ),
    ema_decay=0.999,
  )
  config.gate = dict(
    num_epochs=10.0,
    optimizer=dict(name='adamw', learning_rate=0.003, end_factor=0.1),
    is_augmented=False,
    target_madds=2.4e9,
  )
  config.checkpoint = dict(every_steps=2500)
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
