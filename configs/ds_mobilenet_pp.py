"""DS-MobileNet++ on ImageNet: widths, and 3 x 3 or 5 x 5 depthwise kernels.

    python -m ds_jax.main --config=configs/ds_mobilenet_pp.py \
        --workdir=runs/ds_mobilenet_pp --config.dataset.data_dir=DIR

DIR holds a TFDS copy of imagenet2012 as array_record. Time: not yet run.
Expected: not yet run; the slice lists are ours, and the paper has no figure for
them. The recipe is that of `ds_mobilenet.py` but for what is ours: rates that
change with every step, no cool-down, a target for the MAdds, images held out
for budgets, and RandAugment whose severities rise with the magnitude.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the experiment: what differs from the defaults."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='ds_mobilenet_pp', num_classes=1000, dropout_rate=0.2
  )
  config.dataset = dict(
    name='imagenet2012',
    image_size=224,
    batch_size=512,
    crop='resized',
    crop_ratio=0.875,  # of the short side, in evaluation
    randaugment_layers=2,
    erasing_probability=0.2,
    budget_share=0.02,  # held out of training, to set budgets on
    num_threads=16,
  )
  config.supernet = dict(
    num_epochs=150.0,
    optimizer=dict(
      learning_rate=0.08,
      nesterov=True,
      weight_decay=1e-4,
      warmup_epochs=5.0,
      warmup_init=1e-5,
    ),
  )
  config.calibrate = dict(num_batches=100)
  config.gate = dict(
    num_epochs=30.0,
    optimizer=dict(learning_rate=0.08, weight_decay=0.01),
    target_madds=300e6,
    label_smoothing=0.1,
  )
  config.checkpoint = dict(every_steps=2500)
  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  return config
