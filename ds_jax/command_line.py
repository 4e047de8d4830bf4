"""Experiments from the command line: a file, and fields set by flags.

    --config=configs/ds_digits.py --config.dataset.crop_scale='(0.5, 1)'

A file states what it wants to; every other field has its default in the
dataclass that the section fills. A flag's text is read by that field's type.
"""

import dataclasses
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from ds_jax import fields, paths
from ds_jax.config import ConfigError, Experiment

# What a flag looks like, and a switch that is turned off.
_FLAG = re.compile(r'--?config\.([\w.]+)(?:=(.*))?', re.DOTALL)
_OFF = re.compile(r'--?noconfig\.([\w.]+)')


@dataclasses.dataclass(frozen=True)
class Override:
  """A field set by a flag.

  Attributes:
    field: with dots between sections, as in `dataset.batch_size`.
    text: as it was given.
  """

  field: str
  text: str

  def __str__(self) -> str:
    return f'--config.{self.field}={self.text}'


def find(name: str) -> str:
  """Returns the path of a config file.

  Args:
    name: a path, or a file of this package's `configs` without its ending, as
      in `ds_digits`; either with `:ARGUMENT` after it.

  Raises:
    ConfigError: if there is no such file; it names those that come with ds_jax.
  """
  stem, colon, argument = name.partition(':')
  path = pathlib.Path(paths.expanded(stem))
  here = pathlib.Path(__file__).parent
  # Installed, and in a clone of the repository.
  shipped = {
    file.stem: file
    for folder in (here.parent / 'configs', here / 'configs')
    for file in folder.glob('ds_*.py')
  }
  if path.is_file():
    return f'{path}{colon}{argument}'
  if stem in shipped:
    return f'{shipped[stem]}{colon}{argument}'
  raise ConfigError(
    f'--config={name}: there is no file {stem}; expected one, or one of'
    f' {", ".join(sorted(shipped))}.'
  )


def found(argv: Sequence[str]) -> list[str]:
  """Returns a command line whose `--config` is a path; see `find`."""
  arguments = list(argv)
  for i, argument in enumerate(arguments):
    flag, equals, name = argument.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals:
      arguments[i] = f'{flag}={find(name)}'
    elif i + 1 < len(arguments):
      arguments[i + 1] = find(arguments[i + 1])
  return arguments


def split_arguments(
  argv: Sequence[str],
) -> tuple[list[str], list[Override]]:
  """Takes the flags that set fields out of a command line.

  Args:
    argv: the command line.

  Returns:
    The rest, and the fields in the order of their flags.

  Raises:
    ConfigError: for a flag without a value.
  """
  rest, overrides = [], []
  arguments = iter(argv)
  for argument in arguments:
    flag, off = _FLAG.fullmatch(argument), _OFF.fullmatch(argument)
    if off:
      overrides.append(Override(off[1], 'False'))
    elif not flag:
      rest.append(argument)
    elif flag[2] is not None:
      overrides.append(Override(flag[1], flag[2]))
    elif bool in fields.choices(_field_of(flag[1])[0]):
      overrides.append(Override(flag[1], 'True'))
    else:
      value = next(arguments, None)
      if value is None:
        raise ConfigError(f'{argument} has no value; give {argument}=VALUE.')
      overrides.append(Override(flag[1], value))
  return rest, overrides


def override(
  config: ml_collections.ConfigDict, overrides: Sequence[Override]
) -> None:
  """Sets fields of a config, whether its file names them or not.

  Args:
    config: changed in place.
    overrides: of the command line.

  Raises:
    ConfigError: for a field that does not exist, or a text that is no value of
      it; the message tells the fields, or the form.
  """
  for given in overrides:
    try:
      value = fields.parse(given.text, *_field_of(given.field))
    except ValueError as error:
      raise ConfigError(f'{given}: {error}') from error
    *sections, last = given.field.split('.')
    node = config
    with config.unlocked():
      for name in sections:
        if node.get(name) is None:
          node[name] = ml_collections.ConfigDict()
        node = node[name]
      with node.ignore_type():
        node[last] = value


def listing(experiment: Experiment) -> str:
  """Returns every field, a line each, as a config file could set it."""
  return '\n'.join(_lines('config', dataclasses.asdict(experiment)))


def _lines(name, value):
  if not isinstance(value, dict):
    return [f'{name} = {value!r}']
  return [
    line for field, v in value.items() for line in _lines(f'{name}.{field}', v)
  ]


def _field_of(field: str) -> tuple[Any, Any]:
  """Returns a field's type, `Any` below free options, and its default."""
  hint, default, path = Experiment, None, []
  for name in field.split('.'):
    section = '.'.join(['config', *path])
    if typing.get_origin(hint) in (dict, Mapping) or hint is Any:
      return Any, None
    if not dataclasses.is_dataclass(hint):
      raise ConfigError(
        f'Unknown field --config.{field}: {section} is no section but a value.'
      )
    hints = typing.get_type_hints(hint)
    if name not in hints:
      raise ConfigError(
        f'Unknown field --config.{field}; {section} has {", ".join(hints)}.'
      )
    default = fields.default_of(hint, name)
    hint, path = hints[name], [*path, name]
  if dataclasses.is_dataclass(hint):
    raise ConfigError(
      f'--config.{field} is a section; set one of its fields, as in'
      f' --config.{field}.{dataclasses.fields(hint)[0].name}=VALUE.'
    )
  return hint, default
