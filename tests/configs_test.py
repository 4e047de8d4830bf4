"""Every config is read, fits its model and says how it is run."""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import re
import typing

import jax
import numpy as np
import pytest

from ds_jax import config as config_lib
from ds_jax import data, fields, models, parallel
from ds_jax.train import gate, optimizer, phases

_CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


def _load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# What a config takes, and what it may be but for the default.
_OTHERS = {'dataset': 'cifar100', 'place': 'late_gate'}


def _variants():
  """Every config, and the other data set or gate of those that take one."""
  for path in _CONFIGS:
    get_config = _load(path).get_config
    yield pytest.param(get_config, id=path.stem)
    for name in inspect.signature(get_config).parameters:
      other = functools.partial(get_config, _OTHERS[name])
      yield pytest.param(other, id=f'{path.stem}:{_OTHERS[name]}')


@pytest.mark.parametrize('get_config', [*_variants()])
def test_config_is_read_and_fits_its_model(get_config):
  experiment = config_lib.Experiment.from_config(get_config())
  if experiment.model['num_classes'] is None:
    options = {**experiment.model, 'num_classes': 3}
    experiment = dataclasses.replace(experiment, model=options)
  model = models.create_abstract_model(**experiment.model)
  experiment = phases.with_target(experiment, model)
  # The gate refuses a target that its buckets can't meet.
  gate.Gate(
    experiment.gate,
    model,
    data.normalizer(experiment.dataset),
    image_size=experiment.dataset.image_size,
    num_steps=round(100 * experiment.gate.num_epochs),
    steps_per_epoch=100,
    seed=0,
    executor=parallel.Executor(devices=jax.devices()[:1]),
  )
  assert experiment.supernet.num_random <= len(model.routing_space) - 1
  # What a gate is to spend is set on images held out.
  has_target = experiment.gate.target_madds is not None
  assert has_target == (0 < experiment.dataset.budget_share < 0.5)
  assert (experiment.gate.part == 'gate') == (experiment.dataset.gate_share > 0)


@pytest.mark.parametrize(
  'name',
  [
    'ds_resnet_cifar',
    'ds_resnet50_transfer',
    'ds_vit_cifar',
    'ds_vit_s16_transfer',
  ],
)
def test_a_data_set_that_a_config_does_not_know_is_named(name):
  (path,) = (path for path in _CONFIGS if path.stem == name)
  with pytest.raises(KeyError, match='svhn: expected cifar10 or cifar100'):
    _load(path).get_config('svhn')


def test_a_place_that_the_config_does_not_know_is_named():
  (path,) = (p for p in _CONFIGS if p.stem == 'ds_mobilenet_fashion_mnist')
  with pytest.raises(KeyError, match='nowhere: expected early_gate or late_'):
    _load(path).get_config('nowhere')


def test_the_released_recipe_has_the_release_s_rates():
  """What train.py and timm 0.3.2 make of its configs, epoch by epoch."""
  (path,) = (path for path in _CONFIGS if path.stem == 'ds_mobilenet')
  config = _load(path).get_config()
  for stage, epochs, warmup in (('supernet', 150, 5), ('gate', 30, 0)):
    settings = config[stage]
    assert settings.num_epochs == epochs + 10
    steps = 1281167 // config.dataset.batch_size
    assert steps == 1281167 // 8 // 64
    schedule = optimizer.learning_rate_schedule(
      config_lib.OptimizerConfig(**settings.optimizer),
      (epochs + 10) * steps,
      steps,
    )
    for epoch in range(epochs + 10):
      share = (1 + np.cos(np.pi * min(epoch, epochs) / epochs)) / 2
      expected = 1e-5 + (0.08 - 1e-5) * share
      if epoch < warmup:
        expected = 1e-5 + (0.08 - 1e-5) * epoch / warmup
      for step in (epoch * steps, (epoch + 1) * steps - 1):
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-3)


def test_options_that_are_named_for_the_release_are_set_for_it():
  (path,) = (path for path in _CONFIGS if path.stem == 'ds_mobilenet')
  page = (path.parents[1] / 'docs' / 'paper.md').read_text()
  rows = re.findall(r'^\| .* \| (.*) \|$', page, re.MULTILINE)[1:]
  names = [name for row in rows for name in re.findall(r'`([\w.]+)`', row)]
  assert len(names) > 15
  config = _load(path).get_config().to_dict()
  sections = {**config, 'optimizer': config['gate']['optimizer']}
  for name in names:
    where, _, option = name.rpartition('.')
    places = [sections[where]] if where else sections.values()
    assert any(isinstance(p, dict) and option in p for p in places), name


def _stated(cls, values, where=''):
  """Fields that a config states, and whether each is as it would be anyway."""
  hints = typing.get_type_hints(cls)
  for name, value in values.items():
    if dataclasses.is_dataclass(hints[name]):
      yield from _stated(hints[name], value, f'{where}{name}.')
    elif name != 'model':
      default = fields.default_of(cls, name)
      yield f'{where}{name}', default is not None and value == default


@pytest.mark.parametrize(
  'path',
  # The released recipe states all that the release does.
  [path for path in _CONFIGS if path.stem != 'ds_mobilenet'],
  ids=lambda path: path.stem,
)
def test_a_config_states_what_differs_from_the_defaults(path):
  config = _load(path).get_config().to_dict()
  stated = dict(_stated(config_lib.Experiment, config))
  assert stated and not [
    name for name, is_default in stated.items() if is_default
  ]
