"""Whether a run may go on from a checkpoint: the same config, and versions."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from ds_jax import config as config_lib
from ds_jax import fields, hosts, models

# Where the images are and how they are read, not what they are: hosts may
# differ in it.
FREE_FIELDS = (
  'dataset.data_dir',
  'dataset.num_threads',
  'dataset.read_ahead_mib',
)

# What a run may go on with otherwise. Until an image can't be read, raising and
# skipping are the same.
_MAY_CHANGE = ('dataset.on_bad_image',)


def check_same_config(
  saved: Mapping[str, Any],
  given: Mapping[str, Any],
  phases_begun: Sequence[str],
) -> None:
  """Raises ConfigError where a field that the saved arrays depend on differs.

  Sections of phases that have not begun may still be changed.
  """
  sections = ('seed', 'model', 'init', 'dataset', *phases_begun)
  # Tuples as lists, as in the saved one.
  saved, given = (
    flatten(json.loads(json.dumps(_whole(config)))) for config in (saved, given)
  )
  differences = [
    f'{name} was {saved.get(name)!r} and is {given.get(name)!r}'
    for name in sorted(saved.keys() | given.keys())
    if name.split('.')[0] in sections
    and name not in (*FREE_FIELDS, *_MAY_CHANGE)
    and saved.get(name) != given.get(name)
  ]
  if differences:
    raise config_lib.ConfigError(
      'The workdir holds a run of another config: '
      + '; '.join(differences)
      + '. Restore these values to resume it, or choose a new workdir.'
    )


def check_same_images(
  saved_classes: Sequence[str] | None,
  saved_counts: Mapping[str, int] | None,
  classes: Sequence[str],
  counts: Mapping[str, int],
) -> None:
  """Raises ConfigError where there are other classes, or images.

  With one image more, others would be held out, and their order be another.

  Args:
    saved_classes: names; None where the checkpoint does not say them.
    saved_counts: images in each part; None likewise.
    classes: here.
    counts: here.
  """
  if saved_classes is not None and list(saved_classes) != list(classes):
    gone = [name for name in saved_classes if name not in classes]
    new = [name for name in classes if name not in saved_classes]
    raise config_lib.ConfigError(
      f'The workdir holds a run of other classes, or in another order:'
      f' {gone or "none"} of its {len(saved_classes)} are gone, and'
      f' {new or "none"} of the {len(classes)} here are new. Put the data back,'
      ' or choose a new workdir.'
    )
  if saved_counts is not None and dict(saved_counts) != dict(counts):
    raise config_lib.ConfigError(
      f'The workdir holds a run on {_counts(saved_counts)} images, and there'
      f' are {_counts(counts)}. Put the data back, or choose a new workdir; to'
      ' go on with other images, name this one in config.init.checkpoint.'
    )


def _counts(counts) -> str:
  return ', '.join(f'{count:,} {part}' for part, count in counts.items())


def _whole(config):
  """Fills in defaults: of the model, and of what is newer than a checkpoint."""
  model = models.resolved_options(**config['model'])
  return {**_filled(config_lib.Experiment, config), 'model': model}


def _filled(cls, config):
  kinds = typing.get_type_hints(cls)
  filled = {
    field.name: fields.default_of(cls, field.name)
    for field in dataclasses.fields(cls)
  }
  for name, value in config.items():
    is_section = dataclasses.is_dataclass(kinds.get(name))
    filled[name] = _filled(kinds[name], value) if is_section else value
  return {k: v for k, v in filled.items() if not dataclasses.is_dataclass(v)}


def warn_of_other_versions(saved: Mapping[str, str]) -> None:
  """Says where the rest of a run may draw otherwise than it would have."""
  found = hosts.versions()
  differences = [
    f'{name} was {version} and is {found.get(name)}'
    for name, version in saved.items()
    if version != found.get(name)
  ]
  if differences:
    logging.warning(
      'The checkpoint was saved with other libraries: %s. The run goes on, but'
      ' may not end with the bits of an uninterrupted one: images may come in'
      ' another order, or augmented otherwise.',
      '; '.join(differences),
    )


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns fields of sections in one dict, as in `dataset.name`."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f'{prefix}{name}.'))
    else:
      flat[prefix + name] = value
  kind = str(flat.get('dataset.name')).partition(':')[0]
  if kind in ('idx', 'imagefolder', 'hf'):  # of which the rest is a place
    flat['dataset.name'] = kind
  return flat
