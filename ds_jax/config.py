"""Experiments from the command line: a file, and fields set by flags.

    --config=configs/ds_digits.py --config.dataset.crop_scale='(0.5, 1)'

A file states what it wants to; every other field has its default in the
dataclass that the section fills. A flag's text is read by that field's type.
"""

import ast
import dataclasses
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

# What a flag looks like, and a switch that is turned off.
_FLAG = re.compile(r'--?config\.([\w.]+)(?:=(.*))?', re.DOTALL)
_OFF = re.compile(r'--?noconfig\.([\w.]+)')
_TRUE, _FALSE = ('true', '1', 'yes', 't', 'y'), ('false', '0', 'no', 'f', 'n')
_FORMS = {
  bool: ('True or False', 'True'),
  int: ('a whole number', '3'),
  float: ('a number', '0.5'),
  str: ('a text', 'name'),
}


class ConfigError(ValueError):
  """An experiment that can't be run as it is written."""


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
  path = pathlib.Path(stem).expanduser()
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
  argv: Sequence[str], cls: type
) -> tuple[list[str], list[Override]]:
  """Takes the flags that set fields out of a command line.

  Args:
    argv: the command line.
    cls: the experiment's dataclass.

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
    elif bool in _choices(_type_of(cls, flag[1])):
      overrides.append(Override(flag[1], 'True'))
    else:
      value = next(arguments, None)
      if value is None:
        raise ConfigError(f'{argument} has no value; give {argument}=VALUE.')
      overrides.append(Override(flag[1], value))
  return rest, overrides


def override(
  config: ml_collections.ConfigDict,
  overrides: Sequence[Override],
  cls: type,
) -> None:
  """Sets fields of a config, whether its file names them or not.

  Args:
    config: changed in place.
    overrides: of the command line.
    cls: the experiment's dataclass, which tells fields and types.

  Raises:
    ConfigError: for a field that does not exist, or a text that is no value of
      it; the message tells the fields, or the form.
  """
  for given in overrides:
    value = _parse(given, _type_of(cls, given.field))
    *sections, last = given.field.split('.')
    node = config
    with config.unlocked():
      for name in sections:
        if node.get(name) is None:
          node[name] = ml_collections.ConfigDict()
        node = node[name]
      with node.ignore_type():
        node[last] = value


def _type_of(cls: type, field: str) -> Any:
  """Returns the type of a field; `Any` below a section of free options."""
  hint, path = cls, []
  for name in field.split('.'):
    section = '.'.join(['config', *path])
    if typing.get_origin(hint) in (dict, Mapping) or hint is Any:
      return Any
    if not dataclasses.is_dataclass(hint):
      raise ConfigError(
        f'Unknown field --config.{field}: {section} is no section but a value.'
      )
    hints = typing.get_type_hints(hint)
    if name not in hints:
      raise ConfigError(
        f'Unknown field --config.{field}; {section} has {", ".join(hints)}.'
      )
    hint, path = hints[name], [*path, name]
  if dataclasses.is_dataclass(hint):
    raise ConfigError(
      f'--config.{field} is a section; set one of its fields, as in'
      f' --config.{field}.{dataclasses.fields(hint)[0].name}=VALUE.'
    )
  return hint


def _choices(hint) -> tuple[Any, ...]:
  """Returns the types of which a value may be."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def _parse(given: Override, hint) -> Any:
  """Reads a flag's text as a value of a type."""
  try:
    literal = ast.literal_eval(given.text.strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    literal = given.text
  if hint is Any:
    return literal
  for choice in _choices(hint):
    found, value = _as_type(choice, literal, given.text)
    if found:
      return value
  forms = [_form_of(choice) for choice in _choices(hint)]
  expected = ' or '.join(form for form, _ in forms)
  raise ConfigError(f'{given}: expected {expected}, as in {forms[0][1]}.')


def _as_type(hint, literal, text) -> tuple[bool, Any]:
  """Returns whether a literal is of a type, and the value."""
  if hint in (None, type(None)):
    return literal is None or text == '', None
  if hint is bool:
    word = text.strip().lower()
    return word in _TRUE + _FALSE, word in _TRUE
  if hint is int:
    is_whole = isinstance(literal, (int, float)) and float(literal).is_integer()
    is_whole = is_whole and not isinstance(literal, bool)
    return is_whole, int(literal) if is_whole else None
  if hint is float:
    is_number = isinstance(literal, (int, float))
    is_number = is_number and not isinstance(literal, bool)
    return is_number, float(literal) if is_number else None
  if hint is str:
    is_quoted = isinstance(literal, str)
    # A name may look like a number, but not like nothing.
    return literal is not None, literal if is_quoted else text
  if typing.get_origin(hint) in (dict, Mapping):
    return isinstance(literal, dict), literal
  return _as_tuple(hint, literal)


def _as_tuple(hint, literal) -> tuple[bool, Any]:
  inner = typing.get_args(hint)
  if not isinstance(literal, (tuple, list)):
    return False, None
  if not inner or inner[-1] is Ellipsis or len(inner) == 1:
    inner = (inner[0] if inner else Any,) * len(literal)
  if len(inner) != len(literal):
    return False, None
  pairs = [
    (True, item) if kind is Any else _as_type(kind, item, str(item))
    for kind, item in zip(inner, literal, strict=True)
  ]
  return all(fits for fits, _ in pairs), tuple(value for _, value in pairs)


def _form_of(hint) -> tuple[str, str]:
  """Returns what is expected of a type, and an example."""
  if hint in (None, type(None)):
    return 'None', 'None'
  if hint in _FORMS:
    return _FORMS[hint]
  if typing.get_origin(hint) in (dict, Mapping):
    return 'a dict', "{'name': 1}"
  inner = typing.get_args(hint)
  is_open = not inner or inner[-1] is Ellipsis or len(inner) == 1
  kind, example = _form_of(inner[0]) if inner else _FORMS[float]
  count = 'several of' if is_open else f'{len(inner)} of'
  examples = ', '.join([example] * (2 if is_open else len(inner)))
  return f'{count} {kind}', f'({examples})'
