"""The weights before Stage I: fresh, of another run, or of a plain network."""

import dataclasses
from typing import Any

from absl import logging

from ds_jax import checkpoint, convert, models
from ds_jax import config as config_lib


def initial_variables(
  experiment: config_lib.Experiment, model
) -> models.Variables:
  """Returns the arrays before Stage I, of `model` or of `config.init`.

  Raises:
    CheckpointError: if a workdir holds no intact checkpoint.
    ConfigError: if a file can't be read or the weights do not fit.
  """
  source = experiment.init.checkpoint
  if not source:
    return models.variables_of(model)
  try:
    if checkpoint.is_workdir(source):
      model, sliced = _finetuned(experiment, source, model)
    else:
      state = convert.read(source, experiment.init.state)
      sliced = convert.recognise(state).is_sliced
      model = convert.from_state(state, model)
    if experiment.init.sort_channels and sliced:
      raise ValueError(
        'its slices are trained as they are; leave out'
        f' config.init.sort_channels={experiment.init.sort_channels}.'
      )
    if experiment.init.sort_channels:
      model = convert.sort_channels(model, by=experiment.init.sort_channels)
  except (ImportError, OSError, ValueError) as error:
    raise config_lib.ConfigError(
      f'config.init.checkpoint={source}: {error}'
    ) from error
  return models.variables_of(model)


def with_statistics(
  experiment: config_lib.Experiment, saved: dict[str, Any] | None
) -> config_lib.Experiment:
  """Returns the experiment with what its images are normalised by, if known.

  Args:
    experiment: what it states itself stays.
    saved: what a checkpoint of this run says of itself; None if there is none.

  Raises:
    ConfigError: as `initial_variables`.
  """
  dataset, source = experiment.dataset, experiment.init.checkpoint
  if saved is None and source:
    saved = _known_of(experiment)
  if not saved or 'mean' not in saved:
    return experiment
  dataset = dataclasses.replace(
    dataset,
    mean=dataset.mean or tuple(saved['mean']),
    std=dataset.std or tuple(saved['std']),
  )
  return dataclasses.replace(experiment, dataset=dataset)


def _known_of(experiment) -> dict[str, Any] | None:
  source = experiment.init.checkpoint
  try:
    if checkpoint.is_workdir(source):
      return checkpoint.newest_meta(checkpoint.directory_of(source))
    known = convert.recognise(convert.read(source, experiment.init.state))
    statistics = convert.channel_statistics(source, known)
  except (ImportError, OSError, ValueError) as error:
    raise config_lib.ConfigError(
      f'config.init.checkpoint={source}: {error}'
    ) from error
  if statistics is None:
    logging.warning(
      'What images were normalised by for %s is not known: by that of the data'
      ' set, unless config.dataset.mean and std say it.',
      source,
    )
    return None
  return dict(zip(('mean', 'std'), statistics, strict=True))


def _finetuned(experiment, workdir, model):
  """Returns the model with a workdir's arrays, and if slices are trained."""
  restored = checkpoint.restore(checkpoint.directory_of(workdir))
  theirs = restored.meta['model']
  if theirs['name'] != experiment.model['name']:
    raise ValueError(
      f'it holds a {theirs["name"]}, and config.model.name is'
      f' {experiment.model["name"]}; set it to that.'
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
  sliced = restored.meta['phase'] != 'pretrained'
  return convert.from_network(variables, model), sliced
