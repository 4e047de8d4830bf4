"""Formats of weights, recognised by their names."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ds_jax.convert import loading, official, torchvision, vit

_VIT_MODELS = {192: 'ds_vit_ti16', 384: 'ds_vit_s16'}


@dataclasses.dataclass(frozen=True)
class Format:
  """One way to name weights.

  Attributes:
    title: whose.
    pattern: matches the beginning of names that only this format has, after a
      wrapper's prefix.
    load: takes a state and a model to a model.
    classifier: the name of the classifier's bias.
    model: the model that the weights fit; None means that it depends on them.
    is_sliced: whether the slices are trained, and a gate may be.
    interpolation: how its authors resize images for evaluation.
    has_imagenet_statistics: whether its authors normalise images by ImageNet's
      mean and deviation, all of them.
    model_options: the options of `create_model` that a state needs.
  """

  title: str
  pattern: str
  load: Callable[[Mapping[str, Any], nnx.Module], nnx.Module]
  classifier: str
  model: str | None = None
  is_sliced: bool = False
  interpolation: str = 'bilinear'
  has_imagenet_statistics: bool = False
  model_options: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}

  def num_classes(self, state: Mapping[str, Any]) -> int:
    """Returns how many classes the classifier tells apart.

    Raises:
      ValueError: if there is no classifier.
    """
    plain = loading.plain_names(state, self.pattern)
    if self.classifier in plain:
      return plain[self.classifier].shape[0]
    raise ValueError(
      f'The weights have no classifier ({self.classifier}); say for how many'
      ' classes it shall be, as with --num_classes=1000.'
    )

  def default_model(self, state: Mapping[str, Any]) -> str:
    """Returns the name of the model that the weights fit.

    Raises:
      ValueError: if there is none, or more than one.
    """
    if self.model:
      return self.model
    width = vit.embedding_width(state)
    if width not in _VIT_MODELS:
      raise ValueError(
        f'No model is known for a ViT of {width} channels, only of'
        f' {sorted(_VIT_MODELS)}; choose one, as with --model=ds_vit_s16.'
      )
    return _VIT_MODELS[width]


FORMATS = (
  Format(
    "the authors' DS-Net",
    official.PATTERN,
    official.from_official,
    'classifier.bias',
    'ds_mobilenet',
    is_sliced=True,
    interpolation='bicubic',
    has_imagenet_statistics=True,
    model_options=official.model_options,
  ),
  Format(
    "torchvision's ResNet-50",
    torchvision.PATTERN,
    torchvision.from_torchvision_resnet50,
    'fc.bias',
    'ds_resnet50',
    has_imagenet_statistics=True,
  ),
  Format(
    "timm's ViT",
    vit.TIMM_PATTERN,
    vit.from_timm_vit,
    'head.bias',
    interpolation='bicubic',
  ),
  Format(
    "Hugging Face's ViT",
    vit.HUGGING_FACE_PATTERN,
    vit.from_timm_vit,
    'classifier.bias',
  ),
)


def recognise(state: Mapping[str, Any]) -> Format:
  """Returns the format of a state.

  Raises:
    ValueError: if it is none of those known.
  """
  for known in FORMATS:
    if loading.matches(state, known.pattern):
      return known
  titles = [known.title for known in FORMATS]
  names = ', '.join(itertools.islice(state, 3)) or 'none'
  raise ValueError(
    f'Unknown weights, with names like these: {names}. Expected those of'
    f' {", ".join(titles[:-1])} or {titles[-1]}.'
  )


def from_state(state: Mapping[str, Any], model: nnx.Module) -> nnx.Module:
  """Loads weights of whichever format their names are of.

  Args:
    state: names to arrays, as `read` or PyTorch's `state_dict()` returns them.
    model: what to load into; it is not changed. See `from_official`,
      `from_torchvision_resnet50` and `from_timm_vit`.

  Returns:
    A model with these weights.

  Raises:
    ValueError: if the names are of no known format or the weights do not fit.
  """
  return recognise(state).load(state, model)
