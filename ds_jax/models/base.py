"""What the families share: a trunk for every image, a branch for each bucket.

Axes: N batch, H, W, C channels, K buckets.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import validation
from ds_jax.models import subnet as subnets

Features = Any


class SlicedNetwork(nnx.Module):
  """A supernet; `model(images, subnet)` runs one sub-network of it.

  A family is `trunk`, `gate_logits`, `branch` and `cost_in_parts`.

  Attributes:
    sub_networks: all of them, cheapest first; the last is the widest.
    routing_space: the buckets, those of them that the gate chooses from.
    narrowest: the first sub-network.
    widest: every slice full; a bucket only if the whole trunk has one slice.
    num_classes: outputs of the classifier.
    dtype: what activations are computed in.
  """

  def __init__(
    self,
    sharing_trunk: tuple[subnets.Subnet, ...],
    widest: subnets.Subnet,
    *,
    num_classes: int,
    gate_buckets: Sequence[int] | None,
    dropout_rate: float,
    dtype: str,
  ):
    """Sets what all families have.

    Args:
      sharing_trunk: the sub-networks that a gate can choose from, since they
        share the trunk.
      widest: the last of them, or one with a trunk of its own.
      num_classes: outputs of the classifier.
      gate_buckets: indices of those that the gate chooses from; None means all
        that share the trunk.
      dropout_rate: before the classifier.
      dtype: what activations are computed in.

    Raises:
      ValueError: for a value that can't be.
    """
    validation.check_range('dropout_rate', dropout_rate, low=0, below=1)
    validation.check_choice('dtype', dtype, ('float32', 'bfloat16'))
    apart = () if widest in sharing_trunk else (widest,)
    self.sub_networks = (*sharing_trunk, *apart)
    self.routing_space = subnets.chosen(sharing_trunk, gate_buckets)
    self.narrowest, self.widest = sharing_trunk[0], widest
    self.num_classes = num_classes
    self.dtype = dtype
    self._dropout_rate = dropout_rate
    # Rows of batch statistics: the trunk tells apart two sub-networks at
    # most, the rest tells apart all.
    self._trunk_rows = 1 + len(apart)
    self._branch_rows = len(self.sub_networks)

  def __call__(
    self,
    images: jax.Array,
    subnet: subnets.Subnet,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Runs one sub-network.

    Args:
      images: (N, H, W, 3) float, normalised.
      subnet: one of `sub_networks`.
      momentum: None for inference; for training, the share of the batch in the
        running statistics (see `SlicedBatchNorm`).
      rng: a key for dropout and stochastic depth; None drops nothing.

    Returns:
      Logits (N, num_classes), float32.
    """
    features = self.trunk(images, subnet, momentum=momentum, rng=rng)
    return self.branch(features, subnet, momentum=momentum, rng=rng)

  def trunk(
    self,
    images: jax.Array,
    subnet: subnets.Subnet | None = None,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Features:
    """Runs the part that all buckets share, up to the gate.

    Args:
      images: (N, H, W, 3) float, normalised.
      subnet: None means the narrowest, as for every bucket.
      momentum: as in `__call__`.
      rng: as in `__call__`.

    Returns:
      The gate's features (N, h, w, c), or tokens (N, T, D).
    """
    raise NotImplementedError

  def gate_logits(
    self, features: Features, momentum: float | jax.Array | None = None
  ) -> jax.Array:
    """Returns the slimming head's logits (N, K) of the trunk's features.

    Args:
      features: of `trunk`.
      momentum: of the statistics of the head's own norm, where it has one; as
        in `__call__`.
    """
    raise NotImplementedError

  def branch(
    self,
    features: Features,
    subnet: subnets.Subnet,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the rest, from the gate's features to logits."""
    raise NotImplementedError

  def shares_trunk(self, subnet: subnets.Subnet) -> bool:
    """Whether it starts from `trunk(images)`; else only the widest's does."""
    return self._trunk_rows == 1 or subnet != self.widest

  def cost(self, subnet: subnets.Subnet, image_size: int) -> subnets.Cost:
    """Returns what one image of `image_size` pixels a side costs."""
    trunk, branch = self.cost_in_parts(subnet, image_size)
    return trunk + branch

  def cost_in_parts(
    self, subnet: subnets.Subnet, image_size: int
  ) -> tuple[subnets.Cost, subnets.Cost]:
    """Returns the costs of the trunk and of the branch."""
    raise NotImplementedError

  def _prepare(self, images: jax.Array) -> jax.Array:
    """Checks images and casts them."""
    if images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(
        f'Images of shape {images.shape}: expected (N, H, W, 3), NHWC.'
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f'Images of dtype {images.dtype}: expected normalised floats; see'
        ' ds_jax.data.normalize.'
      )
    return images.astype(self.dtype)

  def _dropout(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    if rng is None or not self._dropout_rate:
      return x
    keep = jax.random.bernoulli(rng, 1 - self._dropout_rate, x.shape)
    return jnp.where(keep, x / (1 - self._dropout_rate), 0.0)

  def _trunk_row(self, subnet: subnets.Subnet) -> int:
    return 0 if self.shares_trunk(subnet) else 1
