"""The weights before Stage I: fresh, of another run, or of a plain network."""

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
