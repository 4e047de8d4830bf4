"""An experiment: every field that can be set, its default, and its checks.

A file of `configs/` states what it wants otherwise, and a flag like
`--config.gate.num_epochs=5` any field (`ds_jax.command_line`). A section is a
frozen dataclass; the parts of the program take theirs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from ds_jax import fields, validation

CROPS = (None, 'pad', 'resized')
EXECUTORS = ('pjit', 'pmap')
HARD_IMAGES = ('try_best', 'give_up')
IMPORTANCES = ('norm_scale', 'l1')
INTERPOLATIONS = ('bilinear', 'bicubic')
TARGETS = ('sandwich', 'correctness')

ConfigError = fields.ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to read and how to augment it.

  Attributes:
    name: of the data set, as in `load_source`.
    data_dir: as in `load_source`.
    image_size: S, in pixels.
    batch_size: images in a global batch, of all processes together.
    crop: training crop: 'pad' (`random_crop` of the evaluation image),
      'resized' (`random_resized_crop`) or None.
    crop_padding: pixels on every side, for 'pad'.
    crop_scale: range of the crop's share of the area, for 'resized'.
    crop_ratio: share of the short side that evaluation keeps of an image
      that has to be resized; 0.875 is usual for ImageNet.
    interpolation: `bilinear` or `bicubic`, of training, evaluation and
      prediction alike; antialiased.
    flip: whether training mirrors half of the images.
    randaugment_layers: operations of `rand_augment` on a training image; 0 is
      off, 2 is usual.
    randaugment_magnitude: of those, 0 .. 10.
    randaugment_increasing: whether none of them is milder for a higher one.
    color_jitter: range of training's `color_jitter` about 1; 0 is off.
    erasing_probability: of `random_erasing` in training; 0 is off.
    erasing_noise: 'uniform' in 0 .. 255, or 'normal' with the mean and the
      deviation of the data set's channels (`channel_statistics`).
    mixup_alpha: of the Beta distribution of Mixup's share; 0 is off. Batches
      are mixed on the device, in Stage I and, where `gate.is_augmented`, in
      Stage II; see `train.mixing`.
    cutmix_alpha: of CutMix's; 0 is off.
    mix_probability: that a batch is mixed at all.
    mix_switch_probability: that it is by CutMix, where both are on.
    num_repeats: how often an image comes in a batch of Stages I and II, each
      time augmented anew (repeated augmentation). An epoch has as many batches
      as without, and so reads 1 / num_repeats of the images; the next one goes
      on with the others.
    mean: of each channel, in units of pixel / 255, that images are normalised
      by; None takes what the weights of `init.checkpoint` were trained with,
      where that is known, else the data set's own.
    std: the deviation, likewise.
    background: R, G, B, 0 .. 255, that is seen through what is transparent in
      a picture.
    on_bad_image: what to do about an image that can't be decoded: `raise`, or
      `skip` it; another takes its place in training. A file that is gone, or
      may not be opened, ends the run with either.
    test_share: of the images, for the test split, where the data set has none
      of its own. Each image's place is decided by its name alone.
    drop_copies: whether files of the test split that are copies of one in the
      train split are left out, of an `imagefolder`; files of the same size are
      read for that.
    gate_share: of the train split, held out from Stage I for the gate.
    budget_share: of the train split, held out from all training; thresholds
      of routers are set on it.
    num_threads: that prepare batches, each a part of one; 0 reads when asked,
      in the caller's. Decoding large images gains from one a core. Small images
      in memory are fastest with 1: more of them only wait for Python's global
      lock.
    read_ahead_mib: how much of batches is prepared ahead, in MiB; one batch at
      least, and 2 * num_threads batches at most.
  """

  name: str
  data_dir: str | None = None
  image_size: int = 32
  batch_size: int = 128
  crop: str | None = 'pad'
  crop_padding: int = 4
  crop_scale: tuple[float, float] = (0.08, 1.0)
  crop_ratio: float = 1.0
  interpolation: str = 'bilinear'
  flip: bool = True
  randaugment_layers: int = 0
  randaugment_magnitude: float = 9.0
  randaugment_increasing: bool = True
  color_jitter: float = 0.0
  erasing_probability: float = 0.0
  erasing_noise: str = 'uniform'
  mixup_alpha: float = 0.0
  cutmix_alpha: float = 0.0
  mix_probability: float = 1.0
  mix_switch_probability: float = 0.5
  num_repeats: int = 1
  mean: tuple[float, float, float] | None = None
  std: tuple[float, float, float] | None = None
  background: tuple[int, int, int] = (255, 255, 255)
  on_bad_image: str = 'raise'
  test_share: float = 0.2
  drop_copies: bool = True
  gate_share: float = 0.0
  budget_share: float = 0.0
  num_threads: int = 2
  read_ahead_mib: int = 512

  def __post_init__(self):
    if self.crop not in CROPS:
      raise ValueError(f'Unknown crop {self.crop!r}; known: {CROPS}.')
    validation.check_choice('interpolation', self.interpolation, INTERPOLATIONS)
    validation.check_choice(
      'erasing_noise', self.erasing_noise, ('uniform', 'normal')
    )
    validation.check_choice(
      'on_bad_image', self.on_bad_image, ('raise', 'skip')
    )
    low, high = self.crop_scale
    limits = {
      'std': self.std is None or min(self.std) > 0,
      'background': all(0 <= x <= 255 for x in self.background),
      'test_share': 0 < self.test_share < 1,
      'image_size': self.image_size >= 1,
      'batch_size': self.batch_size >= 1,
      'crop_padding': self.crop_padding >= 0,
      'crop_scale': 0 < low <= high <= 1,
      'crop_ratio': 0 < self.crop_ratio <= 1,
      'randaugment_layers': self.randaugment_layers >= 0,
      'randaugment_magnitude': 0 <= self.randaugment_magnitude <= 10,
      'color_jitter': 0 <= self.color_jitter <= 1,
      'erasing_probability': 0 <= self.erasing_probability <= 1,
      'mixup_alpha': 0 <= self.mixup_alpha < math.inf,
      'cutmix_alpha': 0 <= self.cutmix_alpha < math.inf,
      'mix_probability': 0 <= self.mix_probability <= 1,
      'mix_switch_probability': 0 <= self.mix_switch_probability <= 1,
      'num_repeats': self.num_repeats >= 1,
      'gate_share': 0 <= self.gate_share < 1,
      'budget_share': 0 <= self.budget_share < 1 - self.gate_share,
      'num_threads': self.num_threads >= 0,
      'read_ahead_mib': self.read_ahead_mib >= 0,
    }
    for option, fits in limits.items():
      if not fits:
        raise ValueError(
          f'Data set option {option} is out of range:'
          f' {getattr(self, option)!r}.'
        )
    if self.batch_size % self.num_repeats:
      raise ValueError(
        f'batch_size={self.batch_size} does not hold every image'
        f' num_repeats={self.num_repeats} times; set batch_size to a multiple'
        ' of num_repeats.'
      )

  @property
  def mixes(self) -> bool:
    """Whether training mixes batches: Mixup or CutMix is on."""
    has_kind = self.mixup_alpha > 0 or self.cutmix_alpha > 0
    return has_kind and self.mix_probability > 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An Optax optimiser with a warm-up and cosine schedule.

  Attributes:
    name: `sgd` (momentum) or `adamw`.
    learning_rate: the peak.
    momentum: of SGD.
    nesterov: whether SGD looks ahead.
    weight_decay: of kernels; added to SGD's gradient (as in PyTorch), or
      AdamW's own. Norms, biases and embeddings are left alone.
    warmup_epochs: linear, from `warmup_init` to `learning_rate`.
    warmup_init: the first learning rate.
    end_factor: the last learning rate as a share of the peak.
    cooldown_epochs: the last ones, at the last learning rate.
    by_epoch: whether the rate stays as it is through an epoch, and the cosine
      begins with the first one, under the warm-up, as with timm's scheduler;
      else it changes with every step, and the cosine begins after the warm-up.
    clip_norm: the gradient's largest global norm; None leaves it.
  """

  name: str = 'sgd'
  learning_rate: float = 0.1
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  warmup_epochs: float = 0.0
  warmup_init: float = 0.0
  end_factor: float = 0.0
  cooldown_epochs: float = 0.0
  by_epoch: bool = False
  clip_norm: float | None = None

  def __post_init__(self):
    validation.check_choice('name', self.name, ('sgd', 'adamw'))
    validation.check_range('learning_rate', self.learning_rate, above=0)
    validation.check_range('warmup_epochs', self.warmup_epochs, low=0)
    validation.check_range('cooldown_epochs', self.cooldown_epochs, low=0)
    if self.clip_norm is not None:
      validation.check_range('clip_norm', self.clip_norm, above=0)


@dataclasses.dataclass(frozen=True)
class SupernetConfig:
  """Stage I.

  Attributes:
    num_epochs: how long; 0 leaves the weights of `init.checkpoint` as they
      are, and trains a gate for them.
    optimizer: see `OptimizerConfig`.
    num_random: random sub-networks a step, beside the widest and narrowest.
    with_replacement: whether a step may draw the same one twice.
    ensemble: whether the narrowest learns from an ensemble (IEB, not IB).
    multi_view: whether teacher and students see different views (MvCo).
    ema_decay: of parameters and statistics; see `optimizer.moving_average`.
    ema_warmup: whether the decay is less in the first steps.
    label_smoothing: of the widest's loss.
    momentum: the batch's share in the running statistics.
    accumulation_steps: micro-batches that a batch is split into. (The other
      stages keep no activations for a backward pass, and don't split.) Each
      process splits its own rows, so that which images meet in a micro-batch,
      and in its batch norms, depends on how many processes there are.
  """

  num_epochs: float
  optimizer: OptimizerConfig
  num_random: int = 2
  with_replacement: bool = False
  ensemble: bool = False
  multi_view: bool = False
  ema_decay: float = 0.997
  ema_warmup: bool = True
  label_smoothing: float = 0.1
  momentum: float = 0.1
  accumulation_steps: int = 1

  def __post_init__(self):
    validation.check_range('num_epochs', self.num_epochs, low=0)
    validation.check_range('num_random', self.num_random, low=0)
    validation.check_range('ema_decay', self.ema_decay, low=0, high=1)
    validation.check_range('momentum', self.momentum, above=0, high=1)
    validation.check_range('accumulation_steps', self.accumulation_steps, low=1)


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
  """Calibration.

  Attributes:
    num_batches: how many training batches.
    momentum: the batch's share in the running statistics, which start from the
      first batch's; None gives all batches the same.
  """

  num_batches: int = 50
  momentum: float | None = None

  def __post_init__(self):
    validation.check_range('num_batches', self.num_batches, low=1)
    if self.momentum is not None:
      validation.check_range('momentum', self.momentum, above=0, high=1)


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """Stage II.

  Attributes:
    num_epochs: how long.
    optimizer: see `OptimizerConfig`.
    part: of the data set, as in `data.load_part`: `train`, which the supernet
      has fitted, or `gate`, which it has never seen.
    is_augmented: whether the images are augmented, or as for evaluation.
    target: `sandwich` or `correctness`; the fields from here to `temperature`
      are of the former alone, but for `target_madds`.
    sandwich_weight: a, of the SGS labels' cross-entropy.
    routed_weight: b, of the routed output's cross-entropy.
    madds_weight: c, used where there is no target.
    madds_unit: what MAdds are counted in for c.
    target_madds: mean MAdds per image to hold; None leaves it to c. It is also
      what a `Predictor` spends unless it is told another budget, as far as
      there are images to set that on (`DataConfig.budget_share`).
    target_fraction: the same, as a share of the largest bucket's MAdds.
    price_rate: how far the price moves in a step, for an excess of the widest
      bucket's MAdds and at the full learning rate.
    price_damping: what is added to the price for the batch's own excess, as an
      augmented Lagrangian does; without it price and head swing.
    hard_images: `try_best` or `give_up`; see `losses.sandwich_labels`.
    balances_labels: whether both SGS labels weigh the same in a batch, however
      many images have them.
    noised_sandwich: whether the SGS labels' cross-entropy takes the relaxed
      sample for logits, as the authors' code does, and not the gate's logits.
    temperature: of the relaxed sample.
    label_smoothing: of both cross-entropies.
    ema_decay: of the head; see `optimizer.moving_average`.
    ema_warmup: whether the decay is less in the first steps.
  """

  num_epochs: float
  optimizer: OptimizerConfig
  part: str = 'train'
  is_augmented: bool = True
  target: str = 'sandwich'
  sandwich_weight: float = 1.0
  routed_weight: float = 1.0
  madds_weight: float = 0.5
  madds_unit: float = 1e9
  target_madds: float | None = None
  target_fraction: float | None = None
  price_rate: float = 0.1
  price_damping: float = 4.0
  hard_images: str = 'try_best'
  balances_labels: bool = False
  noised_sandwich: bool = False
  temperature: float = 1.0
  label_smoothing: float = 0.0
  ema_decay: float = 0.99
  ema_warmup: bool = True

  def __post_init__(self):
    validation.check_range('num_epochs', self.num_epochs, above=0)
    validation.check_range('temperature', self.temperature, above=0)
    validation.check_range('madds_unit', self.madds_unit, above=0)
    validation.check_range('ema_decay', self.ema_decay, low=0, high=1)
    validation.check_choice('target', self.target, TARGETS)
    if self.target_madds is not None and self.target_fraction is not None:
      raise ValueError(
        f'target_madds={self.target_madds} and target_fraction='
        f'{self.target_fraction} say the same; set one of them to None.'
      )
    validation.check_choice('part', self.part, ('train', 'gate'))
    validation.check_choice('hard_images', self.hard_images, HARD_IMAGES)


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """What the weights are before Stage I.

  Attributes:
    checkpoint: None for fresh weights; the workdir of a run or a conversion,
      to finetune that network; or a file of a plain network's weights (see
      `ds_jax.convert`). Another number of classes gets a fresh classifier.
    state: which of the states in a file of PyTorch, or the prefix of one of
      the networks in a state; None means the moving average where there is one.
    sort_channels: `norm_scale` or `l1` puts a plain network's channels in the
      order of their importance, so that slices keep the best ones; None leaves
      them. See `convert.sort_channels`.
  """

  checkpoint: str | None = None
  state: str | None = None
  sort_channels: str | None = None

  def __post_init__(self):
    if self.sort_channels is not None:
      if not self.checkpoint:
        raise ValueError(
          f'sort_channels={self.sort_channels!r} sorts the channels of a'
          ' checkpoint, and there is none; set init.checkpoint.'
        )
      validation.check_choice('sort_channels', self.sort_channels, IMPORTANCES)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep.

  Attributes:
    every_steps: between saves; the end of a phase is always saved.
    keep_last: how many of the newest.
    keep_best: how many of Stage I, beside the newest: those with the best top-1
      on images held out of all training. None are kept where none are held out;
      test images choose nothing.
  """

  every_steps: int = 1000
  keep_last: int = 2
  keep_best: int = 1

  def __post_init__(self):
    validation.check_range('every_steps', self.every_steps, low=1)
    validation.check_range('keep_last', self.keep_last, low=1)
    validation.check_range('keep_best', self.keep_best, low=0)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """How the devices share the work.

  Attributes:
    executor: `pjit` (batch norm over the global batch) or `pmap` (over each
      device's part).
    fsdp: over how many devices large parameters, their optimiser state and
      their moving average are sharded; 1 keeps a copy on each. `pjit` only.
    heartbeat_seconds: for how long a host may be silent until the others take
      it for dead and end.
  """

  executor: str = 'pjit'
  fsdp: int = 1
  heartbeat_seconds: int = 60

  def __post_init__(self):
    validation.check_choice('executor', self.executor, EXECUTORS)
    validation.check_range('fsdp', self.fsdp, low=1)
    validation.check_range('heartbeat_seconds', self.heartbeat_seconds, low=1)
    if self.executor == 'pmap' and self.fsdp > 1:
      raise ValueError(
        f"fsdp={self.fsdp} shards what every replica of executor='pmap' has"
        " whole; set executor='pjit', or fsdp=1."
      )


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
  """What is watched.

  Attributes:
    profile_step: before which step, counted over all phases, a trace begins;
      None takes none. It lies in the workdir's `profile/`, for TensorBoard or
      XProf.
    profile_steps: how many steps it holds.
    watchdog_seconds: after how long without a step or a save the stacks of all
      threads are logged; 0 is never.
  """

  profile_step: int | None = None
  profile_steps: int = 5
  watchdog_seconds: float = 600.0

  def __post_init__(self):
    validation.check_range('profile_steps', self.profile_steps, low=1)
    validation.check_range('watchdog_seconds', self.watchdog_seconds, low=0)
    if self.profile_step is not None:
      validation.check_range('profile_step', self.profile_step, low=0)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything a run depends on, beside the code.

  Attributes:
    seed: of weights, order, augmentation, draws and noise, below 2^32.
    model: the arguments of `create_model`.
    dataset: see `DataConfig`.
    supernet: see `SupernetConfig`.
    calibrate: see `CalibrateConfig`.
    gate: see `GateConfig`.
    init: see `InitConfig`.
    checkpoint: see `CheckpointConfig`.
    parallel: see `ParallelConfig`.
    monitor: see `MonitorConfig`.
    log_every_steps: between rows of metrics.
    eval_every_epochs: between evaluations of narrowest and widest in Stage I,
      each with a save, on images held out of all training (on the test images,
      to be logged alone, where none are); 0 evaluates at the end only.
  """

  model: dict[str, Any]
  dataset: DataConfig
  supernet: SupernetConfig
  gate: GateConfig
  calibrate: CalibrateConfig = CalibrateConfig()
  init: InitConfig = InitConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  parallel: ParallelConfig = ParallelConfig()
  monitor: MonitorConfig = MonitorConfig()
  seed: int = 0
  log_every_steps: int = 50
  eval_every_epochs: float = 1

  def __post_init__(self):
    targets = self.gate.target_madds, self.gate.target_fraction
    if self.gate.target == 'correctness' and targets == (None, None):
      raise ValueError(
        "gate.target='correctness' needs gate.target_madds or"
        ' gate.target_fraction: the mean MAdds that a Predictor spends unless'
        ' it is told another budget.'
      )
    if self.gate.target == 'correctness' and not self.dataset.budget_share:
      raise ValueError(
        "gate.target='correctness' leaves open what to spend, which is settled"
        ' on images held out for it: set dataset.budget_share, for example to'
        ' 0.05.'
      )
    if not self.supernet.num_epochs and not self.init.checkpoint:
      raise ValueError(
        'supernet.num_epochs=0 trains a gate for a network that is there'
        ' already, and there is none; set init.checkpoint.'
      )
    # JAX keeps 32 bits of a seed, without a word.
    validation.check_range('seed', self.seed, low=0, high=2**32 - 1)
    validation.check_range('log_every_steps', self.log_every_steps, low=1)
    validation.check_range('eval_every_epochs', self.eval_every_epochs, low=0)

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> 'Experiment':
    """Reads a `ConfigDict`.

    Raises:
      ConfigError: for an unknown, missing or impossible field, by its name.
    """
    if isinstance(config, ml_collections.ConfigDict):
      config = config.to_dict()
    return fields.read(cls, config)

  @property
  def choice_part(self) -> str | None:
    """The part that checkpoints are chosen by, which no phase trains on."""
    if self.dataset.budget_share:
      return 'budget'
    if self.dataset.gate_share and self.gate.part != 'gate':
      return 'gate'
    return None

  @property
  def micro_batch_size(self) -> int:
    """The smallest batch that a step puts on the devices.

    Raises:
      ConfigError: if the batch does not split into equal micro-batches.
    """
    parts = self.supernet.accumulation_steps
    if self.dataset.batch_size % parts:
      raise ConfigError(
        f'config.dataset.batch_size={self.dataset.batch_size} does not split'
        f' into config.supernet.accumulation_steps={parts} equal parts.'
      )
    return self.dataset.batch_size // parts
