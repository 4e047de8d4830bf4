"""What the families share: a trunk for every image, a branch for each bucket.

Axes: N batch, H, W, C channels (of logits, classes), K buckets.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import validation
from ds_jax.models import channels, functional
from ds_jax.models import subnet as subnets

Features = Any


class Answers(NamedTuple):
  """What several sub-networks say of the same images.

  Attributes:
    features: the trunk's.
    gate_logits: (N, K), of the slimming head.
    logits: of each sub-network, (N, C).
  """

  features: Features
  gate_logits: jax.Array
  logits: tuple[jax.Array, ...]


class SlicedNetwork(nnx.Module):
  """A supernet; `model(images, subnet)` runs one sub-network of it.

  A family is `trunk`, `gate_logits`, `branch`, `cost_in_parts` and
  `_channel_groups`.

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

  def all_buckets(
    self,
    images: jax.Array,
    sub_networks: Sequence[subnets.Subnet] | None = None,
    *,
    momentum: float | jax.Array | None = None,
  ) -> Answers:
    """Runs the trunk once, the gate, and every branch.

    Args:
      images: (N, H, W, 3) float, normalised.
      sub_networks: some of them; None means the routing space. One that has a
        trunk of its own runs that, too.
      momentum: as in `__call__`.
    """
    features = self.trunk(images, momentum=momentum)
    gate_logits = self.gate_logits(features, momentum)
    logits = (
      self.branch(features, subnet, momentum=momentum)
      if self.shares_trunk(subnet)
      else self(images, subnet, momentum=momentum)
      for subnet in sub_networks or self.routing_space
    )
    return Answers(features, gate_logits, tuple(logits))

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
    pooled = self.pooled(features, subnet, momentum=momentum, rng=rng)
    return self.classifier(self._dropout(pooled, rng))

  def pooled(
    self,
    features: Features,
    subnet: subnets.Subnet,
    *,
    momentum: float | jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the rest but for the classifier; returns what that reads (N, c)."""
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

  def channel_groups(self) -> list[channels.Group]:
    """Returns which axes of which arrays are over the same channels.

    One permutation of all axes of a group leaves the widest network's function
    as it is. Every axis that is sliced is in a group, but for those of a gate
    that reads the trunk's narrowest slice only: after a permutation that slice
    holds other channels.
    """
    # The families name more than each model's layers have.
    variables = functional.variables_of(self)
    paths = variables.params.keys() | variables.batch_stats.keys()
    return [
      tuple(member for member in group if member.path in paths)
      for group in self._channel_groups()
    ]

  def with_fused_attention(self, fused: bool) -> 'SlicedNetwork':
    """Returns this network, its arrays shared, with another kind of attention.

    Args:
      fused: as in `nn.attention.softmax_attention`. Without attention it is the
        same.
    """
    del fused
    return self

  def _channel_groups(self) -> Iterator[Iterable[channels.Member]]:
    """Returns the groups, with members that a model may not have."""
    raise NotImplementedError

  def _blocks(self) -> Iterator[str]:
    """Returns the names of the stages' blocks."""
    for i, stage in enumerate(self.stages):
      for j in range(len(stage)):
        yield f'stages/{i}/{j}'

  def _narrowest_before_gate(self) -> int:
    """The channels of the narrowest trunk's last stage."""
    slices = (self.narrowest.stem, *self.narrowest.stages)
    return slices[self.gate_stage].width

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
