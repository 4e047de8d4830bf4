"""The models that have a name, and how they are made."""

import inspect
import typing
from typing import Any, NamedTuple

import jax
from flax import nnx

from ds_jax import fields
from ds_jax.models import base, initial
from ds_jax.models.mobilenet import MobileNet
from ds_jax.models.resnet import ResNet
from ds_jax.models.vit import VisionTransformer


class _Entry(NamedTuple):
  """A family, the side of its images in pixels, and the family's options."""

  family: type[base.SlicedNetwork]
  image_size: int
  options: dict[str, Any]


_MODELS = {
  # The authors' release: 14 buckets, 133 to 565 M MAdds at 224 pixels.
  'ds_mobilenet': _Entry(
    MobileNet,
    224,
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
  # The same widths. The last stage's kernels grow first: they see 7 x 7 pixels
  # and cost least.
  'ds_mobilenet_pp': _Entry(
    MobileNet,
    224,
    dict(
      stem_widths=(16, 24),
      stages=(
        dict(widths=(32, 88), kernels=(3, 5)),
        dict(widths=(48, 168), kernels=(3, 5), depth=2, stride=2),
        dict(widths=(96, 264), kernels=(3, 5), depth=2, stride=2),
        dict(
          widths=tuple(range(224, 641, 32)),
          kernels=(3,) * 8 + (5,) * 6,
          depth=6,
          stride=2,
        ),
        dict(
          widths=tuple(range(736, 1153, 32)),
          kernels=(3,) * 4 + (5,) * 10,
          depth=2,
          stride=2,
        ),
      ),
      gate_stage=3,
    ),
  ),
  # For images of about 32 pixels; the widest network is the last bucket.
  'ds_mobilenet_tiny': _Entry(
    MobileNet,
    32,
    dict(
      stem_widths=(16,),
      stages=(
        dict(widths=(32,)),
        dict(widths=(48,), depth=2, stride=2),
        dict(widths=(16, 48, 88, 128), depth=3),
        dict(widths=(32, 88, 144, 192), depth=2, stride=2),
      ),
      gate_stage=2,
      gate_head='own',
      gate_width=64,
    ),
  ),
  'ds_resnet50': _Entry(
    ResNet,
    224,
    dict(
      stem=dict(widths=(32, 64)),
      stages=(
        dict(widths=(128, 256), inner=(32, 64), depths=(3,)),
        dict(
          widths=(256, 256, 384, 384, 512, 512),
          inner=(64, 96, 112, 128, 128, 128),
          depths=(4,),
          stride=2,
        ),
        dict(
          widths=(640, 640, 768, 896, 896, 1024),
          inner=(160, 192, 192, 224, 256, 256),
          depths=(4, 5, 6, 6, 6, 6),
          stride=2,
        ),
        dict(
          widths=(1280, 1536, 1792, 1792, 2048, 2048),
          inner=(320, 384, 384, 448, 448, 512),
          depths=(3,),
          stride=2,
        ),
      ),
      gate_stage=1,
    ),
  ),
  # For images of about 32 pixels; the widest network is the last bucket.
  'ds_resnet26_cifar': _Entry(
    ResNet,
    32,
    dict(
      stem=dict(widths=(32,), kernel_size=3, stride=1, pool=False),
      stages=(
        dict(widths=(64,), inner=(16,), depths=(1,)),
        dict(
          widths=(48, 80, 112, 128),
          inner=(12, 20, 28, 32),
          depths=(1, 2, 3, 3),
          stride=2,
        ),
        dict(
          widths=(64, 128, 192, 256),
          inner=(16, 32, 48, 64),
          depths=(1, 2, 2, 2),
          stride=2,
        ),
        dict(
          widths=(128, 256, 384, 512),
          inner=(32, 64, 96, 128),
          depths=(1, 1, 2, 2),
          stride=2,
        ),
      ),
      gate_stage=1,
    ),
  ),
  'ds_vit_s16': _Entry(
    VisionTransformer,
    224,
    dict(
      patch_size=16,
      stages=(
        dict(widths=(384,), heads=(6,), hidden=(1536,), depths=(2,)),
        dict(
          widths=(192, 256, 256, 320, 384, 384),
          heads=(3, 4, 4, 5, 6, 6),
          hidden=(384, 768, 1024, 1152, 1280, 1536),
          depths=(3, 4, 4, 5, 5, 5),
        ),
        dict(
          widths=(192, 192, 256, 256, 320, 384),
          heads=(3, 3, 4, 5, 6, 6),
          hidden=(384, 768, 1024, 1152, 1280, 1536),
          depths=(3, 4, 5, 5, 5, 5),
        ),
      ),
      gate_stage=1,
    ),
  ),
  'ds_vit_ti16': _Entry(
    VisionTransformer,
    224,
    dict(
      patch_size=16,
      stages=(
        dict(widths=(192,), heads=(3,), hidden=(768,), depths=(2,)),
        dict(
          widths=(96, 128, 160, 192),
          heads=(1, 2, 3, 3),
          hidden=(192, 384, 640, 768),
          depths=(3, 4, 5, 5),
        ),
        dict(
          widths=(96, 128, 160, 192),
          heads=(1, 2, 3, 3),
          hidden=(192, 384, 640, 768),
          depths=(3, 4, 5, 5),
        ),
      ),
      gate_stage=1,
    ),
  ),
  # For images of about 32 pixels.
  'ds_vit_cifar': _Entry(
    VisionTransformer,
    32,
    dict(
      patch_size=4,
      head_dim=32,
      pooling='mean',
      stages=(
        dict(widths=(96,), heads=(3,), hidden=(192,), depths=(1,)),
        dict(
          widths=(48, 64, 80, 96),
          heads=(1, 2, 3, 3),
          hidden=(48, 96, 144, 192),
          depths=(2, 2, 3, 3),
        ),
        dict(
          widths=(48, 64, 80, 96),
          heads=(1, 2, 3, 3),
          hidden=(48, 96, 144, 192),
          depths=(1, 2, 2, 3),
        ),
      ),
      gate_stage=1,
    ),
  ),
}


def list_models() -> list[str]:
  """Returns the names that `create_model` knows."""
  return sorted(_MODELS)


def options_of(name: str) -> dict[str, Any]:
  """Returns the options of `create_model` for a model, and their types."""
  family = _MODELS[name].family
  kinds = typing.get_type_hints(family.__init__)
  options = inspect.signature(family.__init__).parameters.keys()
  known = {option: kinds[option] for option in options - {'self', 'rngs'}}
  return {**known, 'seed': int, 'init': str}


def resolved_options(name: str, **options) -> dict[str, Any]:
  """Returns every option's value: as given, the model's own, or the family's.

  Args:
    name: one of `list_models()`.
    **options: of `create_model`.
  """
  entry = _MODELS[name]
  signature = inspect.signature(entry.family.__init__)
  defaults = {
    option: parameter.default
    for option, parameter in signature.parameters.items()
    if parameter.default is not parameter.empty
  }
  return {
    'name': name, 'num_classes': 1000, 'init': 'lecun',
    **defaults, **_own_options(name), **options,
  }  # fmt: skip


def create_model(
  name: str,
  num_classes: int = 1000,
  *,
  seed: int = 0,
  init: str = 'lecun',
  **options,
):
  """Makes a supernet with fresh weights.

  Args:
    name: one of `list_models()`.
    num_classes: outputs of the classifier.
    seed: of the initial weights.
    init: their distribution, `lecun`, `fan_out` or `truncated_normal`; see
      `initial.redraw`.
    **options: replace the named model's own, for example `dtype='bfloat16'` or
      `dropout_rate=0.2`; see the family's class.

  Returns:
    The model, a Flax NNX module.

  Raises:
    ValueError: for an unknown name or option.
  """
  build = _builder(name, num_classes, seed, init, options)
  graph, _ = nnx.split(nnx.eval_shape(build))
  # Jitted, since one small program for each weight takes far longer.
  return nnx.merge(graph, jax.jit(lambda: nnx.state(build()))())


def create_abstract_model(
  name: str,
  num_classes: int = 1000,
  *,
  seed: int = 0,
  init: str = 'lecun',
  **options,
):
  """Makes a supernet without weights: `jax.ShapeDtypeStruct`s in their place.

  Enough for `cost`, and for `Architecture`, which brings arrays to it. See
  `create_model` for the rest.
  """
  return nnx.eval_shape(_builder(name, num_classes, seed, init, options))


def image_size(name: str) -> int:
  """Returns the side, in pixels, of the images a model is made for."""
  return _MODELS[name].image_size


def size_options(name: str, image_size: int) -> dict[str, int]:
  """Returns what `create_model` needs to know of another image size."""
  family = _MODELS[name].family
  fixed = 'image_size' in inspect.signature(family.__init__).parameters
  return {'image_size': image_size} if fixed else {}


def _builder(name, num_classes, seed, init, options):
  """Returns a function that makes the model, once its options are known."""
  if name not in _MODELS:
    raise ValueError(
      f'Unknown model {name!r}; expected one of {", ".join(list_models())}.'
    )
  family, whole = _MODELS[name].family, {**_own_options(name), **options}
  _check_options(name, {'num_classes': num_classes, 'seed': seed, **options})

  def build():
    rngs = nnx.Rngs(seed)
    model = family(num_classes=num_classes, rngs=rngs, **whole)
    initial.redraw(model, init, rngs)
    return model

  return build


def _own_options(name):
  entry = _MODELS[name]
  return {**size_options(name, entry.image_size), **entry.options}


def _check_options(name, given):
  known = options_of(name)
  for option, value in sorted(given.items()):
    if option not in known:
      raise ValueError(
        f'Unknown option {option!r} of model {name!r}; expected'
        f' {", ".join(sorted(known))}.'
      )
    try:
      fields.convert(value, known[option])
    except ValueError as error:
      raise ValueError(
        f'{option}={value!r} of model {name!r}: {error}'
      ) from error
