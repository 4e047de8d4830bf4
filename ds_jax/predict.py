"""Routed inference from a checkpoint.

Axes: N images, H, W, K buckets, C classes.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import checkpoint, data, models, routing


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the network says of each image, and what that cost.

  Attributes:
    logits: (N, C) float32.
    labels: (N,) int32, the largest logit.
    buckets: (N,) int32, the sub-network that ran.
    madds: (N,) int64, multiply-adds spent.
  """

  logits: np.ndarray
  labels: np.ndarray
  buckets: np.ndarray
  madds: np.ndarray


class Predictor:
  """`predictor(images)` routes every image through the bucket its gate picks.

  Each batch shape compiles once, into one program that holds every branch.

  Attributes:
    model: the network, weights included.
    image_size: what images are resized to.
  """

  def __init__(
    self,
    model,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float = 1.0,
    has_gate: bool = True,
  ):
    """Wraps a model; `restore` is the usual way here.

    Args:
      model: a supernet with trained weights.
      image_size: S, in pixels.
      mean: of the channels, in units of pixel / 255.
      std: of the channels, in units of pixel / 255.
      crop_ratio: share of the short side kept of images of another size.
      has_gate: whether the slimming head is trained.
    """
    self.model = model
    self.image_size = image_size
    self._has_gate = has_gate
    self._crop_ratio = crop_ratio
    self._variables = models.variables_of(model)
    self._sub_networks = models.sub_networks(model)
    self._madds = np.asarray(
      [model.cost(s, image_size).madds for s in self._sub_networks], np.int64
    )
    architecture = models.Architecture(model)
    normalize = functools.partial(data.normalize, mean=mean, std=std)
    self._route = jax.jit(functools.partial(_route, architecture, normalize))
    self._run = jax.jit(
      functools.partial(_run, architecture, normalize),
      static_argnames='subnet',
    )

  @classmethod
  def restore(cls, workdir: str, step: int | None = None) -> 'Predictor':
    """Restores a checkpoint of a run or a conversion.

    Args:
      workdir: that of `ds_jax.main`, or the output of `ds_jax.convert`.
      step: one of those in its `checkpoints/`; None means the newest intact.

    Raises:
      CheckpointError: if there is no intact checkpoint.
    """
    restored = checkpoint.restore(checkpoint.directory_of(workdir), step)
    meta = restored.meta
    model = models.create_abstract_model(**meta['model'])
    return cls(
      models.Architecture(model).bind(
        models.variables_from(restored.tree['network'])
      ),
      image_size=meta['image_size'],
      mean=meta['mean'],
      std=meta['std'],
      crop_ratio=meta['crop_ratio'],
      has_gate=meta['stage'] in ('gate', 'converted'),
    )

  def __call__(
    self, images: np.ndarray, subnet: int | None = None
  ) -> Prediction:
    """Classifies a batch.

    Args:
      images: (N, H, W, 3) or (N, H, W, 1) uint8. Those of another size are
        brought to `image_size` as evaluation does.
      subnet: runs this sub-network for every image: a bucket, or K for the
        widest network where it is not a bucket. None lets the gate choose.

    Returns:
      The prediction, on the host.

    Raises:
      ValueError: for images of another kind, a `subnet` that does not exist,
        or a gate that is not trained yet.
    """
    images = self._prepare(images)
    if subnet is None:
      self._check_gate()
      logits, buckets = self._route(self._variables, images)
    else:
      chosen = self._sub_network(subnet)
      logits = self._run(self._variables, images, subnet=chosen)
      buckets = np.full(len(images), chosen.index, np.int32)
    logits, buckets = np.asarray(logits), np.asarray(buckets)
    labels = logits.argmax(-1).astype(np.int32)
    return Prediction(logits, labels, buckets, self._madds[buckets])

  def _prepare(self, images) -> np.ndarray:
    images = np.asarray(images)
    if (
      images.ndim != 4
      or images.shape[-1] not in (1, 3)
      or images.dtype != np.uint8
      or not len(images)
    ):
      raise ValueError(
        f'Images of shape {images.shape} and dtype {images.dtype}: expected'
        ' one or more, (N, H, W, 3) or (N, H, W, 1), uint8 in 0 .. 255; add'
        ' the batch axis to a single image with image[None].'
      )
    if images.shape[-1] == 1:
      images = np.repeat(images, 3, axis=-1)
    size = self.image_size
    if images.shape[1:3] == (size, size):
      return images
    return np.stack(
      [data.for_evaluation(i, size, self._crop_ratio) for i in images]
    )

  def _check_gate(self):
    if not self._has_gate:
      raise ValueError(
        'This checkpoint is from before Stage II: its gate is not trained.'
        ' Choose a sub-network with predictor(images, subnet=k), or train on.'
      )

  def _sub_network(self, index: int) -> models.Subnet:
    if not 0 <= index < len(self._sub_networks):
      raise ValueError(
        f'subnet={index}: expected 0 (narrowest) to'
        f' {len(self._sub_networks) - 1} (widest).'
      )
    return self._sub_networks[index]


def _route(architecture, normalize, variables, images):
  model = architecture.bind(variables)
  features = model.trunk(normalize(images))
  buckets = model.gate_logits(features).argmax(-1).astype(jnp.int32)
  branches = [
    functools.partial(model.branch, subnet=s) for s in model.routing_space
  ]
  return routing.dispatch_images(buckets, branches, features), buckets


def _run(architecture, normalize, variables, images, subnet):
  return architecture.bind(variables)(normalize(images), subnet)
