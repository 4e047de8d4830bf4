"""Fields from flags: every one, by its type, with errors that name the form."""

import ast
import collections
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest

import micro
from ds_jax import (
  checkpoint,
  command_line,
  convert,
  data,
  export,
  inference,
  models,
  paths,
)
from ds_jax import config as config_lib
from ds_jax.benchmark import command
from ds_jax.convert import command as convert_command
from ds_jax.train import loop

_REPOSITORY = pathlib.Path(__file__).parents[1]


def override(*arguments):
  """The micro experiment after these flags."""
  rest, fields = command_line.split_arguments(arguments)
  assert rest == []
  given = micro.get_config()
  given.dataset.name = 'digits'
  given.lock()
  command_line.override(given, fields)
  assert given.is_locked
  return given


def parsed(*arguments):
  return config_lib.Experiment.from_config(override(*arguments))


def fields_of(cls, prefix=''):
  """Every field below a dataclass, and its default."""
  for field in dataclasses.fields(cls):
    hint = typing.get_type_hints(cls)[field.name]
    if dataclasses.is_dataclass(hint):
      yield from fields_of(hint, f'{prefix}{field.name}.')
    elif field.default is not dataclasses.MISSING:
      yield f'{prefix}{field.name}', field.default


def test_every_field_of_every_section_is_set_whether_the_file_has_it_or_not():
  defaults = dict(fields_of(config_lib.Experiment))
  assert {'seed', 'dataset.crop_scale', 'gate.optimizer.nesterov'} & set(
    defaults
  ) and len(defaults) > 50
  # One budget for both, or a run needs more than the defaults.
  flags = [f'--config.{field}={value}' for field, value in defaults.items()]
  found = parsed(*flags)
  for field, value in defaults.items():
    node = found
    for name in field.split('.'):
      node = getattr(node, name)
    assert node == value, field


@pytest.mark.parametrize(
  'flag, value',
  [
    ('dataset.crop=None', None),
    ('dataset.crop=resized', 'resized'),
    ("dataset.crop='resized'", 'resized'),
    ('dataset.crop_scale=(0.5, 1)', (0.5, 1)),
    ('dataset.crop_scale=0.5,1', (0.5, 1)),
    ('dataset.crop_scale=[0.5, 1.0]', (0.5, 1.0)),
    ('dataset.name=123', '123'),
    ('dataset.flip=false', False),
    ('dataset.batch_size=1e2', 100),
    ('gate.target_madds=None', None),
    ('gate.target_madds=5000', 5000.0),
    ('supernet.optimizer.learning_rate=1e-3', 1e-3),
    ('gate.optimizer.clip_norm=None', None),
    ('model.dropout_rate=0.25', 0.25),
    ('model.gate_buckets=(0, 2)', (0, 2)),
    ('model.dtype=bfloat16', 'bfloat16'),
    ('init.checkpoint=~/run=1', '~/run=1'),
  ],
)
def test_values_are_read_by_the_field_s_type(flag, value):
  found = override(f'--config.{flag}')
  for name in flag.partition('=')[0].split('.'):
    found = found[name]
  assert found == value and type(found) is type(value)


def test_flags_may_have_their_value_apart_or_be_switches():
  rest, fields = command_line.split_arguments(
    ['x', '--config=f.py', '--config.dataset.batch_size', '8',
     '--config.dataset.flip', '--noconfig.supernet.ensemble', '--workdir=w'],
  )  # fmt: skip
  assert rest == ['x', '--config=f.py', '--workdir=w']
  assert [str(field) for field in fields] == [
    '--config.dataset.batch_size=8',
    '--config.dataset.flip=True',
    '--config.supernet.ensemble=False',
  ]


@pytest.mark.parametrize(
  'flag, message',
  [
    (
      'dataset.crop_scale=0.5',
      r'crop_scale=0.5: expected two numbers, as in \(0.08, 1.0\)\.',
    ),
    ('dataset.crop_scale=(1, 2, 3)', r'as in \(0.08, 1.0\)'),
    ('dataset.batch_size=None', 'batch_size=None: expected a whole number, as'),
    ('dataset.batch_size=1.5', 'expected a whole number'),
    ('dataset.flip=perhaps', 'expected True or False'),
    ('gate.target_madds=many', 'expected a number or None, as in 0.5'),
    ('dataset.name=None', 'expected a text'),
    ('dataset.crop_scal=1', 'Unknown .*dataset.crop_scal; config.dataset has'),
    ('datasets.name=x', 'Unknown .*; config has model, dataset, '),
    ('seed.name=1', 'config.seed is no section'),
    ('dataset=1', 'dataset is a section; set one of its fields, as in .*name='),
    ('dataset.batch_size', 'batch_size has no value'),
  ],
)
def test_errors_name_field_and_form(flag, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    override(f'--config.{flag}')


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    (
      'dataset.crop_scale',
      0.5,
      r'config.dataset.crop_scale=0.5: expected two numbers, as in \(0.08, 1.0',
    ),
    ('dataset.crop_scale', (0.1, 'a'), 'crop_scale=.*: expected two numbers'),
    (
      'dataset.batch_size',
      '64',
      "config.dataset.batch_size='64': expected a w",
    ),
    ('dataset.flip', 'no', "config.dataset.flip='no': expected True or False"),
    (
      'supernet.ema_decay',
      None,
      'ema_decay=None: expected a number, as in 0.9',
    ),
    (
      'supernet.optimizer',
      'sgd',
      "optimizer='sgd': expected a section, a dict",
    ),
    ('gate', 5, 'config.gate=5: expected a section'),
    ('model', 'ds_vit', "config.model='ds_vit': expected a dict"),
    ('init.checkpoint', 3, 'config.init.checkpoint=3: expected a text or None'),
  ],
)
def test_a_value_of_a_file_that_does_not_fit_is_named(field, value, message):
  values = micro.get_config().to_dict()
  values['init'] = {}
  *sections, name = field.split('.')
  node = values
  for section in sections:
    node = node[section]
  node[name] = value
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.Experiment.from_config(values)


def test_values_of_a_file_become_those_of_their_types():
  values = micro.get_config().to_dict()
  values['dataset'] |= {
    'crop_scale': [np.float32(0.5), 1],
    'batch_size': np.int64(16),
    'data_dir': pathlib.Path('a/b'),
  }
  found = config_lib.Experiment.from_config(values).dataset
  assert found.crop_scale == (0.5, 1.0) and type(found.batch_size) is int
  assert found.data_dir == 'a/b'


@pytest.mark.parametrize(
  ('option', 'value', 'message'),
  [
    ('num_classes', 'ten', "num_classes='ten' of model .*: expected a whole n"),
    ('dropout_rate', None, 'dropout_rate=None of model .*: expected a number'),
    (
      'gate_hidden',
      8,
      'gate_hidden=8 .*: expected several whole numbers, as in',
    ),
    ('gate_width', 0.5, 'gate_width=0.5 .*: expected a whole number or None'),
    ('stages', 'a', "stages='a' .*: expected several values"),
    ('widths', 3, "Unknown option 'widths' .*; expected dropout_rate, dtype, "),
  ],
)
def test_an_option_of_a_model_that_does_not_fit_is_named(
  option, value, message
):
  options = {'name': 'ds_mobilenet_tiny', option: value}
  with pytest.raises(ValueError, match=message):
    models.create_abstract_model(**options)


def test_text_that_is_nearly_python_warns_of_nothing():
  # Warnings are errors here.
  assert override('--config.dataset.data_dir=1if').dataset.data_dir == '1if'
  assert override(r"--config.dataset.data_dir='\d'").dataset.data_dir == r'\d'


def test_a_config_is_found_by_its_name_or_path():
  name = f'{_REPOSITORY}/configs/ds_digits.py'
  assert command_line.find('ds_digits') == name
  assert command_line.find(name) == name
  cifar = f'{_REPOSITORY}/configs/ds_vit_cifar.py:cifar100'
  assert command_line.find('ds_vit_cifar:cifar100') == cifar
  found = command_line.found(
    ['main', '--config=ds_digits', '--config', 'ds_digits']
  )
  assert found == ['main', f'--config={name}', '--config', name]
  with pytest.raises(
    config_lib.ConfigError, match='no file digits; .*ds_digits'
  ):
    command_line.find('digits')


@pytest.mark.parametrize(
  'arguments',
  [
    ('--config.seed=1', '--config=ds_digits', '--config.dataset.crop_scal=1'),
    ('--config.dataset.flip=maybe', '--config=ds_digits'),
  ],
)
def test_the_command_ends_with_the_message_alone(arguments, tmp_path):
  # In a file, in any order, as on the command line.
  (tmp_path / 'flags').write_text('\n'.join(arguments))
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'ds_jax.main'),
      *(f'--workdir={tmp_path / "run"}', f'--flagfile={tmp_path / "flags"}'),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith('ConfigError: ')
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_home_is_expanded_wherever_a_path_comes_in(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert str(paths.expanded('~/run')) == str(tmp_path / 'run')
  assert str(paths.expanded('gs://bucket/~/x')) == 'gs://bucket/~/x'
  micro.save_finished_run(tmp_path / 'run')
  predictor = inference.Predictor.restore('~/run')
  assert checkpoint.has_steps(checkpoint.directory_of('~/run'))
  assert checkpoint.is_workdir('~/run')
  export.save(predictor, '~/x.ds', batch_size=1, subnet=0)
  assert export.load('~/x.ds').batch_size == 1
  name = micro.write_images(tmp_path)
  there = data.load_source(name, 'train')
  assert len(data.load_source('idx:~', 'train')) == len(there)
  assert len(data.load_source('idx', 'train', '~')) == len(there)
  with pytest.raises(FileNotFoundError, match='There is no'):
    convert.read('~/weights.npz')
  (tmp_path / 'weights.npz').write_bytes(b'')
  with pytest.raises(ValueError, match='damaged'):
    convert.read('~/weights.npz')


def test_home_is_expanded_by_every_command(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  # Nothing is left in a folder of that name.
  monkeypatch.chdir(tmp_path)
  micro.save_finished_run(tmp_path / 'run')
  micro.write_images(tmp_path)
  (tmp_path / 'mine.py').write_text('def get_config(): pass')
  assert command_line.find('~/mine.py') == str(tmp_path / 'mine.py')
  export.main(['--workdir=~/run', '--output=~/x.ds', '--subnet=0'])
  assert (tmp_path / 'x.ds').is_file()
  command.run(
    command.Options(workdir='~/run', json='~/b.json', sections=(), seconds=0)
  )
  assert (tmp_path / 'b.json').is_file()
  with pytest.raises(SystemExit, match='~/run/checkpoints holds'):
    convert_command.main(['--input=~/no.npz', '--output=~/run'])
  given = micro.get_config()
  given.dataset.name = 'idx:~'
  given.init = {'checkpoint': '~/run'}
  with loop.Run(given, '~/new') as run:
    run.start()
  assert (tmp_path / 'new/metrics.jsonl').is_file()
  assert (tmp_path / 'new/checkpoints').is_dir()
  assert not (tmp_path / '~').exists()


def test_a_wheel_has_every_module_and_the_configs(tmp_path):
  """Installed without the repository, from another folder."""
  files = subprocess.run(
    ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
    cwd=_REPOSITORY,
    capture_output=True,
    text=True,
  ).stdout.split('\0')
  source, target = tmp_path / 'source', tmp_path / 'target'
  for name in filter(None, files):
    if (_REPOSITORY / name).is_file():
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(_REPOSITORY / name, source / name)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps',
     f'--target={target}', str(source)],
    check=True,
  )  # fmt: skip
  for folder in ('ds_jax', 'configs'):
    shipped = target / ('ds_jax/configs' if folder == 'configs' else folder)
    for path in (source / folder).rglob('*.py'):
      assert (shipped / path.relative_to(source / folder)).is_file(), path
  done = subprocess.run(
    [sys.executable, '-m', 'ds_jax.main', '--config=ds_digits',
     f'--workdir={tmp_path / "run"}', '--mode=evaluate'],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(target)},
    capture_output=True,
    text=True,
  )  # fmt: skip
  # The config was found; there is nothing to evaluate.
  assert 'CheckpointError: No checkpoints in' in done.stderr, done.stderr


def test_the_whole_experiment_is_printed_as_a_config_file_would_have_it():
  experiment = parsed('--config.gate.num_epochs=5')
  listing = command_line.listing(experiment)
  assert 'config.gate.num_epochs = 5.0' in listing.splitlines()
  names = {field for field, _ in fields_of(config_lib.Experiment)}
  stated = {line.partition(' = ')[0] for line in listing.splitlines()}
  assert {f'config.{name}' for name in names} <= stated
  # Dots make dicts.
  config = collections.defaultdict(dict)
  for line in listing.splitlines():
    name, _, value = line.partition(' = ')
    *sections, last = name.split('.')[1:]
    node = config
    for section in sections:
      node = node.setdefault(section, {})
    node[last] = ast.literal_eval(value)
  assert config_lib.Experiment.from_config(config) == experiment


def test_printing_it_needs_no_workdir(tmp_path):
  command = [sys.executable, '-m', 'ds_jax.main', '--config=ds_digits']
  done = subprocess.run(
    [*command, '--print_config', '--config.seed=7'],
    capture_output=True, check=True, text=True, cwd=tmp_path,
  )  # fmt: skip
  assert 'config.seed = 7' in done.stdout.splitlines()
  assert not list(tmp_path.iterdir())
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 1
  assert '--workdir is missing' in done.stdout + done.stderr
