"""An experiment's config, checked, and the parts it is run with.

`configs/*.py` return a `ConfigDict` of plain numbers. Here it becomes frozen
dataclasses, with one clear error for a field that no part knows.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from absl import logging

from ds_jax import checkpoint, convert, data, models, validation
from ds_jax import config as config_lib
from ds_jax import parallel as parallel_lib
from ds_jax.train import budget as budget_lib
from ds_jax.train import calibrate as calibrate_lib
from ds_jax.train import gate as gate_lib
from ds_jax.train import monitor as monitor_lib
from ds_jax.train import supernet as supernet_lib

ConfigError = config_lib.ConfigError

STAGES = ('supernet', 'calibrate', 'gate', 'budget')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep.

  Attributes:
    every_steps: between saves; the end of a stage is always saved.
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

  Images are normalised by the data set's own statistics, whatever the weights
  were trained with.
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
      validation.check_choice(
        'sort_channels', self.sort_channels, convert.IMPORTANCES
      )


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
  dataset: data.DataConfig
  supernet: supernet_lib.SupernetConfig
  gate: gate_lib.GateConfig
  calibrate: calibrate_lib.CalibrateConfig = calibrate_lib.CalibrateConfig()
  init: InitConfig = InitConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  parallel: parallel_lib.ParallelConfig = parallel_lib.ParallelConfig()
  monitor: monitor_lib.MonitorConfig = monitor_lib.MonitorConfig()
  seed: int = 0
  log_every_steps: int = 50
  eval_every_epochs: float = 1

  def __post_init__(self):
    if self.gate.target == 'correctness' and self.gate.target_madds is None:
      raise ValueError(
        "gate.target='correctness' needs gate.target_madds: the mean MAdds that"
        ' a Predictor spends unless it is told another budget.'
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
    return config_lib.read(cls, config)

  def check_dataset(self) -> None:
    """Raises ConfigError unless the model tells the data set's classes apart.

    Where labels alone tell the classes, those of a small set may not all occur.
    """
    info = data.dataset_info(self.dataset.name, self.dataset.data_dir)
    num_classes = self.model.get('num_classes', 1000)
    if info.labels is None and num_classes != info.num_classes:
      raise ConfigError(
        f'config.model.num_classes={num_classes}, but {info.name} has'
        f' {info.num_classes} classes; set it to that.'
      )
    if num_classes < info.num_classes:
      low, high = info.labels
      hint = (
        f'; or are they 1 to {num_classes}, and one too high?'
        if (low, high) == (1, num_classes)
        else '.'
      )
      raise ConfigError(
        f'config.model.num_classes={num_classes} has the labels 0 to'
        f' {num_classes - 1}, but {info.name} has labels {low} to {high}; set'
        f' it to {info.num_classes}{hint}'
      )
    if num_classes > info.num_classes:
      logging.warning(
        'config.model.num_classes=%d, and the labels of %s end at %d: the last'
        ' classes do not occur.',
        num_classes,
        info.name,
        info.num_classes - 1,
      )

  def steps_per_epoch(self, part: str) -> int:
    """Returns the whole batches in a part; see `data.load_part`.

    Raises:
      ConfigError: if there are fewer images than in a batch.
    """
    num_images = len(data.load_part(self.dataset, part))
    if num_images < self.dataset.batch_size:
      raise ConfigError(
        f'config.dataset.batch_size={self.dataset.batch_size} is larger than'
        f' the {part} part of {self.dataset.name} with {num_images} images.'
      )
    return num_images // self.dataset.batch_size

  @property
  def eval_every_steps(self) -> int:
    """Steps between evaluations in Stage I; opens the train part."""
    if not self.eval_every_epochs:
      return sys.maxsize
    return max(1, round(self.eval_every_epochs * self.steps_per_epoch('train')))

  @property
  def choice_part(self) -> str | None:
    """The part that checkpoints are chosen by, which no stage trains on."""
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

  @property
  def prediction_meta(self) -> dict[str, Any]:
    """What a `Predictor` needs to know beside the arrays."""
    mean, std = data.channel_statistics(self.dataset.name)
    return {
      'model': self.model,
      'image_size': self.dataset.image_size,
      'crop_ratio': self.dataset.crop_ratio,
      'interpolation': self.dataset.interpolation,
      'mean': mean,
      'std': std,
      'gate': {
        'target': self.gate.target,
        'target_madds': self.gate.target_madds,
      },
    }

  def create_model(self):
    """Makes the supernet, with its initial weights."""
    return models.create_model(**{'seed': self.seed, **self.model})

  def initial_variables(self, model) -> models.Variables:
    """Returns the arrays before Stage I, of `model` or of `config.init`.

    Raises:
      CheckpointError: if a workdir holds no intact checkpoint.
      ConfigError: if a file can't be read or the weights do not fit.
    """
    source = self.init.checkpoint
    if not source:
      return models.variables_of(model)
    try:
      if checkpoint.is_workdir(source):
        model, sliced = self._finetuned(source, model)
      else:
        state = convert.read(source, self.init.state)
        sliced = convert.recognise(state).is_sliced
        model = convert.from_state(state, model)
      if self.init.sort_channels and sliced:
        raise ValueError(
          'its slices are trained as they are; leave out'
          f' config.init.sort_channels={self.init.sort_channels}.'
        )
      if self.init.sort_channels:
        model = convert.sort_channels(model, by=self.init.sort_channels)
    except (ImportError, OSError, ValueError) as error:
      raise ConfigError(f'config.init.checkpoint={source}: {error}') from error
    return models.variables_of(model)

  def _finetuned(self, workdir, model):
    """Returns the model with a workdir's arrays, and if slices are trained."""
    restored = checkpoint.restore(checkpoint.directory_of(workdir))
    theirs = restored.meta['model']
    if theirs['name'] != self.model['name']:
      raise ValueError(
        f'it holds a {theirs["name"]}, and config.model.name is'
        f' {self.model["name"]}; set it to that.'
      )
    source = models.create_abstract_model(**theirs)
    for option in ('head_dim', 'slicing'):  # which shapes do not tell
      old, new = (getattr(m, option, None) for m in (source, model))
      if old != new:
        raise ValueError(
          f'it has {option}={old!r}, and config.model.{option} is {new!r}; set'
          ' it to that.'
        )
    variables = models.variables_from(restored.tree['network'])
    sliced = restored.meta['stage'] != 'pretrained'
    return convert.from_network(variables, model), sliced

  def normalize(self, images: jax.Array) -> jax.Array:
    """Takes uint8 images to the model's floats."""
    mean, std = data.channel_statistics(self.dataset.name)
    return data.normalize(images, mean, std)

  def make_stages(self, model, executor: parallel_lib.Executor):
    """Returns the stages, in order, by `STAGES`' names."""
    self.check_dataset()
    common = {
      'model': model,
      'normalize': self.normalize,
      'executor': executor,
    }

    def schedule(num_epochs, part):
      steps_per_epoch = self.steps_per_epoch(part)
      num_steps = max(1, round(num_epochs * steps_per_epoch))
      return {
        'num_steps': num_steps if num_epochs else 0,
        'steps_per_epoch': steps_per_epoch,
        'seed': self.seed,
      }

    return (
      supernet_lib.Supernet(
        self.supernet, **common, **schedule(self.supernet.num_epochs, 'train')
      ),
      calibrate_lib.Calibrate(self.calibrate, **common),
      gate_lib.Gate(
        self.gate,
        **common,
        **schedule(self.gate.num_epochs, self.gate.part),
        image_size=self.dataset.image_size,
      ),
      budget_lib.Budget(
        **common,
        num_steps=self._num_budget_batches(),
        batch_size=self.dataset.batch_size,
      ),
    )

  def _num_budget_batches(self) -> int:
    if self.dataset.budget_share:
      return data.num_eval_batches(self.dataset, 'budget')
    if self.gate.target == 'correctness':
      raise ConfigError(
        "config.gate.target='correctness' leaves open what to spend, which is"
        ' settled on images held out for it: set config.dataset.budget_share,'
        ' for example to 0.05.'
      )
    return 0
