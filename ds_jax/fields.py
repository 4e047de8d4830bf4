"""Values of a config's fields, and of a model's options, by their types.

A type may be `bool`, `int`, `float`, `str`, `None`, a tuple or a sequence, or a
union. Of any other a value is only checked to be one.
"""

import ast
import dataclasses
import numbers
import os
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_NOUNS = {
  bool: 'True or False',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  type(None): 'None',
}
_PLURALS = {int: 'whole numbers', float: 'numbers', str: 'texts'}
_COUNTS = {2: 'two', 3: 'three', 4: 'four'}
_EXAMPLES = {bool: True, int: 3, float: 0.5, str: 'name'}
_WORDS = {
  **dict.fromkeys(('true', '1', 'yes', 't', 'y'), True),
  **dict.fromkeys(('false', '0', 'no', 'f', 'n'), False),
}


_Config = TypeVar('_Config')


class ConfigError(ValueError):
  """An experiment that can't be run as it is written."""


def read(cls: type[_Config], values: Any, where: str = 'config') -> _Config:
  """Makes a dataclass, and those in it, of nested dicts.

  Args:
    cls: the dataclass.
    values: field to value, or to such a dict.
    where: what errors call it.

  Raises:
    ConfigError: for an unknown, missing or impossible field, by its name.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f'{where}={values!r}: expected a section, a dict.')
  _check_names(cls, values, where)
  arguments = {
    name: _read_field(cls, name, value, f'{where}.{name}')
    for name, value in values.items()
  }
  try:
    return cls(**arguments)
  except ValueError as error:
    raise ConfigError(f'In {where}: {error}') from error


def convert(value: Any, kind: Any, example: Any = None) -> Any:
  """Returns a value as its type has it: tuples of lists, floats of integers.

  Args:
    value: what a file or a caller gave.
    kind: the type.
    example: a value, for the message; None takes one of the type.

  Raises:
    ValueError: that says what is expected.
  """
  for choice in choices(kind):
    try:
      return _convert_to(choice, value)
    except ValueError:
      continue
  raise ValueError(f'expected {describe(kind, example)}.')


def parse(text: str, kind: Any, example: Any = None) -> Any:
  """Reads the text of a flag, as `convert` does values."""
  try:
    with warnings.catch_warnings():
      # Of text that is no Python, as most is.
      warnings.simplefilter('ignore')
      literal = ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    literal = text
  for choice in choices(kind):
    try:
      return _convert_to(choice, _as_meant(text, literal, choice))
    except ValueError:
      continue
  raise ValueError(f'expected {describe(kind, example)}.')


def choices(kind: Any) -> tuple[Any, ...]:
  """Returns the types of which a value may be."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return typing.get_args(kind)
  return (kind,)


def describe(kind: Any, example: Any = None) -> str:
  """Returns in words, and by an example, what is expected of a type."""
  nouns = ' or '.join(dict.fromkeys(map(_noun, choices(kind))))
  if example is None:
    example = _example(choices(kind)[0])
  return nouns if example is None else f'{nouns}, as in {example}'


def _as_meant(text, literal, kind):
  """Returns what a text stands for where this type is expected."""
  if kind is bool:
    return _WORDS.get(text.strip().lower(), literal)
  if kind is type(None) and not text:
    return None
  # A name may look like a number, but not like nothing.
  is_name = kind is str and literal is not None
  return text if is_name and not isinstance(literal, str) else literal


def _convert_to(kind, value):
  """Raises ValueError, without words, for a value of another type."""
  elements = _elements(kind)
  if elements is not None:
    return _convert_elements(elements, value)
  is_bool = isinstance(value, bool)
  if kind is Any:
    return value
  if kind is bool and (is_bool or (type(value) is int and value in (0, 1))):
    return bool(value)
  if kind is int and isinstance(value, numbers.Real) and not is_bool:
    if isinstance(value, numbers.Integral) or float(value).is_integer():
      return int(value)
  elif kind is float and isinstance(value, numbers.Real) and not is_bool:
    return float(value)
  elif kind is str and isinstance(value, os.PathLike):
    return os.fspath(value)
  elif kind not in (bool, int, float) and isinstance(
    value, typing.get_origin(kind) or kind
  ):
    return value
  raise ValueError


def _convert_elements(kinds, value):
  if not isinstance(value, (list, tuple)):
    raise ValueError
  if kinds[-1] is ...:
    kinds = kinds[:1] * len(value)
  # Raises ValueError, too, where there are more or fewer.
  return tuple(convert(v, k) for v, k in zip(value, kinds, strict=True))


def _elements(kind) -> tuple[Any, ...] | None:
  """The types of a tuple's elements, an Ellipsis last for any number."""
  origin = typing.get_origin(kind)
  if origin is tuple:
    return typing.get_args(kind)
  return (*typing.get_args(kind), ...) if origin is Sequence else None


def _noun(kind) -> str:
  elements = _elements(kind)
  if elements is None:
    return _NOUNS.get(kind, 'a dict')
  kinds = {kind for kind in elements if kind is not ...}
  plural = _PLURALS.get(*kinds, 'values') if len(kinds) == 1 else 'values'
  count = 'several' if elements[-1] is ... else _COUNTS[len(elements)]
  return f'{count} {plural}'


def _example(kind):
  elements = _elements(kind)
  if elements is None:
    is_dict = (typing.get_origin(kind) or kind) in (dict, Mapping)
    return {'name': 1} if is_dict else _EXAMPLES.get(kind)
  one = _example(elements[0])
  count = 2 if elements[-1] is ... else len(elements)
  return None if one is None else (one,) * count


def default_of(cls: type, name: str) -> Any:
  """Returns a field's default; None where there is none."""
  default = cls.__dataclass_fields__[name].default
  return None if default is dataclasses.MISSING else default


def _check_names(cls, values, where):
  known = {field.name: field for field in dataclasses.fields(cls)}
  for name in sorted(values.keys() - known.keys()):
    raise ConfigError(
      f'Unknown field {where}.{name}; {where} has {", ".join(known)}.'
    )
  for name, field in known.items():
    if (
      name not in values
      and field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ConfigError(f'Missing field {where}.{name}.')


def _read_field(cls, name, value, where):
  kind = typing.get_type_hints(cls)[name]
  if dataclasses.is_dataclass(kind):
    return read(kind, value, where)
  try:
    return convert(value, kind, default_of(cls, name))
  except ValueError as error:
    raise ConfigError(f'{where}={value!r}: {error}') from error
