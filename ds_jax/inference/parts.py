"""A network's parts, on its own weights or on a copy of their slices.

Axes: N images, S side of an image, K buckets, C classes.
"""

import abc
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ds_jax import models, routing
from ds_jax.inference import preparation

Weights = Any


class Parts(abc.ABC):
  """Trunk, gate and branches, as functions of weights and an input.

  Attributes:
    slices_weights: whether every call slices its weights.
  """

  slices_weights: bool

  def __init__(
    self,
    model,
    normalize: Callable[[jax.Array], jax.Array],
    image_size: int,
    platform: str | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: the supernet; its arrays are not used.
      normalize: uint8 images to the model's floats.
      image_size: S.
      platform: that it is lowered for, if not this process's.
    """
    # Fused attention runs on few machines: not in what is written for later.
    model = model.with_fused_attention(platform is None)
    self._architecture = models.Architecture(model)
    self._variables = jax.eval_shape(lambda: models.variables_of(model))
    self._normalize = normalize
    self._image_size = image_size
    self._chunk_size = _chunk_size(
      image_size, platform or jax.default_backend()
    )
    self._buckets = {str(s.index): s for s in model.routing_space}

  @abc.abstractmethod
  def prepare(self, variables: models.Variables) -> Weights:
    """Returns the weights that the parts take."""

  @abc.abstractmethod
  def needed(
    self, weights: Weights, indices: Iterable[int], *, gate: bool = False
  ) -> Weights:
    """Returns those that a call needs: each takes time, used or not.

    Args:
      weights: all.
      indices: of the buckets that may run.
      gate: whether it may.
    """

  @abc.abstractmethod
  def run(
    self, weights: Weights, images: jax.Array, subnet: models.Subnet
  ) -> jax.Array:
    """Returns logits (N, C) of images (N, S, S, 3) uint8, of one bucket."""

  @abc.abstractmethod
  def _run_part(self, part, weights, x):
    """Runs `trunk`, `gate` or a bucket by its index."""

  def network(self, weights: Weights) -> routing.Network:
    """Returns the functions of the input, of images (N, S, S, 3) uint8."""

    def part(name):
      return functools.partial(self._run_part, name, weights)

    def branch(name):
      return lambda x: _in_chunks(part(name), x, self._chunk_size)

    return routing.Network(
      branch('trunk'), part('gate'), [branch(name) for name in self._buckets]
    )

  def _compute(self, part, variables, x):
    """Runs a part on the network's own weights."""
    model = self._architecture.bind(variables)
    if part == 'trunk':
      with jax.named_scope('trunk'):
        return model.trunk(self._normalize(x))
    if part == 'gate':
      with jax.named_scope('gate'):
        return model.gate_logits(x)
    with jax.named_scope(f'bucket_{part}'):
      return model.branch(x, self._buckets[part])


class SharedParts(Parts):
  """All share the network's own weights, and slice them in every call."""

  slices_weights = True

  def prepare(self, variables):
    """See `Parts`."""
    return variables

  def needed(self, weights, indices, *, gate=False):
    """See `Parts`."""
    del indices, gate
    return weights

  def run(self, weights, images, subnet):
    """See `Parts`; of any sub-network, a bucket or not."""
    model = self._architecture.bind(weights)
    return _in_chunks(
      lambda x: model(self._normalize(x), subnet), images, self._chunk_size
    )

  def _run_part(self, part, weights, x):
    return self._compute(part, weights, x)


class PreparedParts(Parts):
  """Each has a copy of its slices, and of what follows from them alone."""

  slices_weights = False

  def __init__(self, model, normalize, image_size, platform=None):
    """See `Parts`."""
    super().__init__(model, normalize, image_size, platform)
    self._splits: dict[Any, preparation.Split] = {}

  def prepare(self, variables):
    """See `Parts`; by the names of the parts.

    Raises:
      PreparationError: where this JAX does not allow it.
    """
    size = self._image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    trunk = functools.partial(self._compute, 'trunk')
    features = jax.eval_shape(trunk, self._variables, images)
    splits = {
      part: self._split(part, images if part == 'trunk' else features)
      for part in ('trunk', 'gate', *self._buckets)
    }

    def prepare(variables):
      return {part: split.prepare(variables) for part, split in splits.items()}

    formats = None
    if jax.default_backend() == 'gpu':
      made = jax.eval_shape(prepare, variables)
      devices = jax.tree.leaves(variables)[0].devices()
      # Weights on several devices stay as they are.
      if len(devices) == 1:
        formats = jax.tree.map(lambda x: _gpu_format(x.ndim, *devices), made)
    return jax.jit(prepare, out_shardings=formats)(variables)

  def needed(self, weights, indices, *, gate=False):
    """See `Parts`."""
    names = ['trunk', *(['gate'] if gate else []), *map(str, indices)]
    return {name: weights[name] for name in names}

  def run(self, weights, images, subnet):
    """See `Parts`."""
    network = self.network(weights)
    branch = network.branches[list(self._buckets).index(str(subnet.index))]
    return branch(network.trunk(images))

  def _run_part(self, part, weights, x):
    return self._split(part, x).run(weights[part], x)

  def _split(self, part, x):
    # Kept, since tracing is most of a start with compiled programs at hand.
    key = part, x.shape, x.dtype
    if key not in self._splits:
      compute = functools.partial(self._compute, part)
      self._splits[key] = preparation.split(compute, self._variables, x)
    return self._splits[key]


def make_parts(
  model, normalize, image_size: int, *, presliced: bool
) -> tuple[Parts, Weights]:
  """Returns the parts of a model with arrays, and their weights.

  Args:
    model: the supernet.
    normalize: as of `Parts`.
    image_size: as of `Parts`.
    presliced: whether to prepare them. Where this JAX does not allow it they
      share the weights, with a warning.
  """
  variables = models.variables_of(model)
  if presliced:
    parts = PreparedParts(model, normalize, image_size)
    try:
      return parts, parts.prepare(variables)
    except preparation.PreparationError as error:
      logging.warning('Weights are sliced in every call: %s', error)
  parts = SharedParts(model, normalize, image_size)
  return parts, parts.prepare(variables)


def _gpu_format(num_axes: int, device: jax.Device) -> Any:
  """How a prepared array lies in memory; None leaves it to XLA.

  cuDNN reads a convolution's kernel (k, k, I, O) with the outputs first, and
  would be given a transposed copy in every call.
  """
  axes = (3, 0, 1, 2) if num_axes == 4 else tuple(range(num_axes))
  try:
    # Imported here: it is experimental, and of use to GPUs alone.
    from jax.experimental import layout

    return layout.Format(
      layout.Layout(axes), jax.sharding.SingleDeviceSharding(device)
    )
  except (AttributeError, ImportError, TypeError) as error:
    logging.log_first_n(
      logging.WARNING, 'Kernels are not laid out for cuDNN: %s', 1, error
    )
    return None


# Pixels of images that run at a time on CPU. The activations of more leave the
# caches, and an image then takes longer than in a small batch.
_CPU_PIXELS = 8 * 224**2


def _chunk_size(image_size: int, platform: str) -> int | None:
  """Returns how many images to run at a time; None means any number."""
  if platform != 'cpu':
    return None
  largest = max(1, _CPU_PIXELS // image_size**2)
  return 1 << (largest.bit_length() - 1)


def _in_chunks(run, x, size):
  """Runs (N, ...), so many at a time."""
  if size is None or len(x) <= size:
    return run(x)
  rest = len(x) % size
  whole = x[: len(x) - rest].reshape(-1, size, *x.shape[1:])
  results = jax.lax.map(run, whole)
  results = results.reshape(-1, *results.shape[2:])
  if not rest:
    return results
  return jnp.concatenate([results, run(x[len(x) - rest :])])
