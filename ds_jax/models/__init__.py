"""Supernets by name.

Every family offers the same few names: `model(images, subnet)`, its parts
`trunk`, `gate_logits` and `branch`, `cost(subnet, image_size)`,
`routing_space`, `narrowest` and `widest`.
"""

import inspect

import jax
from flax import nnx

from ds_jax.models.functional import (
  Architecture,
  Arrays,
  Variables,
  variables_of,
)
from ds_jax.models.mobilenet import MobileNet, StageSpec
from ds_jax.models.subnet import Cost, StageSlice, Subnet

__all__ = [
  'Architecture',
  'Arrays',
  'Cost',
  'MobileNet',
  'StageSlice',
  'StageSpec',
  'Subnet',
  'Variables',
  'create_abstract_model',
  'create_model',
  'image_size',
  'list_models',
  'sub_networks',
  'variables_of',
]

_FAMILIES = {
  # The authors' release: 14 buckets, 133 to 565 M MAdds at 224 pixels.
  'ds_mobilenet': (
    MobileNet,
    dict(
      stem_widths=(16, 24),
      stages=(
        dict(widths=(32, 88)),
        dict(widths=(48, 168), depth=2, stride=2),
        dict(widths=(96, 264), depth=2, stride=2),
        dict(widths=tuple(range(224, 641, 32)), depth=6, stride=2),
        dict(widths=tuple(range(736, 1153, 32)), depth=2, stride=2),
      ),
      gate_stage=3,
    ),
  ),
  # For images of about 32 pixels; the widest network is the last bucket.
  'ds_mobilenet_tiny': (
    MobileNet,
    dict(
      stem_widths=(16,),
      stages=(
        dict(widths=(32,)),
        dict(widths=(48,), stride=2),
        dict(widths=(16, 48, 88, 128), depth=3),
        dict(widths=(32, 88, 144, 192), depth=2, stride=2),
      ),
      gate_stage=2,
      gate_width=64,
    ),
  ),
}

_IMAGE_SIZES = {'ds_mobilenet': 224, 'ds_mobilenet_tiny': 32}


def list_models() -> list[str]:
  """Returns the names that `create_model` knows."""
  return sorted(_FAMILIES)


def create_model(
  name: str, num_classes: int = 1000, *, seed: int = 0, **options
):
  """Makes a supernet with fresh weights.

  Args:
    name: one of `list_models()`.
    num_classes: outputs of the classifier.
    seed: of the initial weights.
    **options: replace the named model's own, for example `dtype='bfloat16'` or
      `dropout_rate=0.2`; see the family's class.

  Returns:
    The model, a Flax NNX module.

  Raises:
    ValueError: for an unknown name or option.
  """
  build = _builder(name, num_classes, seed, options)
  graph, _ = nnx.split(nnx.eval_shape(build))
  # Jitted, since one small program for each weight takes far longer.
  return nnx.merge(graph, jax.jit(lambda: nnx.state(build()))())


def create_abstract_model(
  name: str, num_classes: int = 1000, *, seed: int = 0, **options
):
  """Makes a supernet without weights: `jax.ShapeDtypeStruct`s in their place.

  Enough for `cost`, and for `Architecture`, which brings arrays to it. See
  `create_model` for the rest.
  """
  return nnx.eval_shape(_builder(name, num_classes, seed, options))


def sub_networks(model) -> tuple[Subnet, ...]:
  """Returns the routing space, and the widest after it where it is not in."""
  if model.widest in model.routing_space:
    return model.routing_space
  return (*model.routing_space, model.widest)


def image_size(name: str) -> int:
  """Returns the side, in pixels, of the images a model is made for."""
  return _IMAGE_SIZES[name]


def _builder(name, num_classes, seed, options):
  """Returns a function that makes the model, once its options are known."""
  if name not in _FAMILIES:
    raise ValueError(
      f'Unknown model {name!r}; expected one of {", ".join(list_models())}.'
    )
  family, defaults = _FAMILIES[name]
  known = inspect.signature(family.__init__).parameters.keys()
  known -= {'self', 'rngs'}
  unknown = sorted(options.keys() - known)
  if unknown:
    raise ValueError(
      f'Unknown option {unknown[0]!r} of model {name!r}; expected'
      f' {", ".join(sorted(known))}.'
    )
  return lambda: family(
    num_classes=num_classes, rngs=nnx.Rngs(seed), **{**defaults, **options}
  )
