"""The phases of a run, made of its experiment.

Each is an object with `init(variables) -> state` and `step(state, batch, step)
-> state, scalars`; what it makes of the network is `state.network`.
"""

import dataclasses
import sys

from absl import logging

from ds_jax import config as config_lib
from ds_jax import data, parallel
from ds_jax.train import calibrate, gate, supernet

NAMES = ('supernet', 'calibrate', 'gate')


def with_classes(
  experiment: config_lib.Experiment, info: data.DatasetInfo
) -> config_lib.Experiment:
  """Returns the experiment with the data set's classes where it says None."""
  if experiment.model.get('num_classes', 1000) is not None:
    return experiment
  model = {**experiment.model, 'num_classes': info.num_classes}
  return dataclasses.replace(experiment, model=model)


def class_names(
  experiment: config_lib.Experiment, info: data.DatasetInfo
) -> tuple[str, ...]:
  """Returns a name for each of the model's outputs.

  Those that the data set has no class for have their number.
  """
  num_classes = experiment.model.get('num_classes', 1000)
  known = info.class_names[:num_classes]
  return (*known, *map(str, range(len(known), num_classes)))


def with_target(
  experiment: config_lib.Experiment, model
) -> config_lib.Experiment:
  """Returns the experiment with `gate.target_fraction` in MAdds."""
  fraction = experiment.gate.target_fraction
  if fraction is None:
    return experiment
  image_size = experiment.dataset.image_size
  largest = max(model.cost(s, image_size).madds for s in model.routing_space)
  gate_config = dataclasses.replace(
    experiment.gate, target_madds=fraction * largest, target_fraction=None
  )
  return dataclasses.replace(experiment, gate=gate_config)


def check_dataset(
  experiment: config_lib.Experiment, info: data.DatasetInfo
) -> None:
  """Raises ConfigError unless the model tells the data set's classes apart.

  Where labels alone tell the classes, those of a small set may not all occur.
  """
  num_classes = experiment.model.get('num_classes', 1000)
  if info.labels is None and num_classes != info.num_classes:
    raise config_lib.ConfigError(
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
    raise config_lib.ConfigError(
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


def steps_per_epoch(experiment: config_lib.Experiment, part: str) -> int:
  """Returns the whole batches in a part; see `data.load_part`.

  Raises:
    ConfigError: if there are fewer images than in a batch.
  """
  num_images = len(data.load_part(experiment.dataset, part))
  if num_images < experiment.dataset.batch_size:
    raise config_lib.ConfigError(
      f'config.dataset.batch_size={experiment.dataset.batch_size} is larger'
      f' than the {part} part of {experiment.dataset.name} with {num_images}'
      ' images.'
    )
  return num_images // experiment.dataset.batch_size


def eval_every_steps(experiment: config_lib.Experiment) -> int:
  """Steps between evaluations in Stage I; opens the train part."""
  if not experiment.eval_every_epochs:
    return sys.maxsize
  epoch = steps_per_epoch(experiment, 'train')
  return max(1, round(experiment.eval_every_epochs * epoch))


def make_phases(
  experiment: config_lib.Experiment, model, executor: parallel.Executor
) -> tuple[supernet.Supernet, calibrate.Calibrate, gate.Gate]:
  """Returns the phases, in the order of `NAMES`.

  Args:
    experiment: their numbers.
    model: the supernet; its arrays are not used.
    executor: runs them on the devices.

  Raises:
    ConfigError: if a batch does not fit the data set.
    ValueError: for numbers that the model has no place for.
  """
  common = {
    'model': model,
    'normalize': data.normalizer(experiment.dataset),
    'executor': executor,
  }

  def schedule(num_epochs, part):
    epoch = steps_per_epoch(experiment, part)
    num_steps = max(1, round(num_epochs * epoch))
    return {
      'num_steps': num_steps if num_epochs else 0,
      'steps_per_epoch': epoch,
      'seed': experiment.seed,
    }

  return (
    supernet.Supernet(
      experiment.supernet,
      **common,
      dataset=experiment.dataset,
      **schedule(experiment.supernet.num_epochs, 'train'),
    ),
    calibrate.Calibrate(experiment.calibrate, **common),
    gate.Gate(
      experiment.gate,
      **common,
      **schedule(experiment.gate.num_epochs, experiment.gate.part),
      image_size=experiment.dataset.image_size,
      dataset=experiment.dataset,
    ),
  )
