"""What every bucket and the gate say of labelled images, and what buckets cost.

Enough to tell what any router would do with these images, and far smaller than
the logits.

Axes: N images, K buckets, C classes, R runs, W weights of an average.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from ds_jax.routing import router as routers

# Shares of the first bucket's logits in an average with the last bucket's.
MIX_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@flax.struct.dataclass
class Outcomes:
  """Outcomes of N images.

  Attributes:
    gate_logits: (N, K).
    confidence: (N, K) of every bucket's answer.
    right: (N, K) bool, whether the answer is the label.
    mixed: (N, W) bool, whether the average of the first and the last bucket's
      logits is right, by `MIX_WEIGHTS`.
  """

  gate_logits: jax.Array
  confidence: routers.Confidence
  right: jax.Array
  mixed: jax.Array

  def __len__(self) -> int:
    return len(self.right)

  def confidence_at(self, bucket: int) -> routers.Confidence:
    """Returns (N,), of one bucket's answers."""
    return jax.tree.map(lambda x: x[:, bucket], self.confidence)


def observe(
  gate_logits: jax.Array, logits: jax.Array, labels: jax.Array
) -> Outcomes:
  """Returns the outcomes of N images.

  Args:
    gate_logits: (N, K).
    logits: (N, K, C), of every bucket.
    labels: (N,).
  """
  confidence = routers.confidence_of(logits)
  mixed = [
    (weight * logits[:, 0] + (1 - weight) * logits[:, -1]).argmax(-1) == labels
    for weight in MIX_WEIGHTS
  ]
  return Outcomes(
    gate_logits,
    confidence,
    confidence.labels == labels[:, None],
    jnp.stack(mixed, axis=-1),
  )


def empty_outcomes(
  num_images: int, num_buckets: int, num_classes: int
) -> Outcomes:
  """Returns zeros in the place of the outcomes of so many images."""
  shapes = jax.eval_shape(
    observe,
    jax.ShapeDtypeStruct((num_images, num_buckets), jnp.float32),
    jax.ShapeDtypeStruct((num_images, num_buckets, num_classes), jnp.float32),
    jax.ShapeDtypeStruct((num_images,), jnp.int32),
  )
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def images_held_out(tree: Mapping[str, Any]) -> Outcomes | None:
  """Returns the outcomes in a checkpoint; None if it has none.

  Args:
    tree: of the last stage, `Budget`: `outcomes`, and a `mask` that is False
      where there is no image.
  """
  if not np.any(tree.get('mask', False)):
    return None
  template = empty_outcomes(1, 1, 2)
  outcomes = serialization.from_state_dict(template, tree['outcomes'])
  return jax.tree.map(
    lambda x: np.asarray(x)[np.asarray(tree['mask'])], outcomes
  )


def replay(router: routers.Router, outcomes: Outcomes) -> np.ndarray:
  """Returns (N, R) int32, the buckets that the router would run; K for none."""
  return np.asarray(_replay(router, outcomes.gate_logits, outcomes.confidence))


# Jitted, since a budget is found by asking some tens of routers.
@jax.jit
def _replay(router, gate_logits, confidence):
  images = jnp.arange(len(gate_logits))

  def confidence_of(run, buckets):
    del run
    # One that has stopped is not asked again, so its answer may be any.
    known = jnp.minimum(buckets, router.num_buckets - 1)
    return jax.tree.map(lambda x: x[images, known], confidence)

  return routers.walk(router, gate_logits, confidence_of)


def right_answers(runs: np.ndarray, outcomes: Outcomes) -> np.ndarray:
  """Returns (N,) bool, whether the last of the runs (N, R) gave the label."""
  last = routers.last_bucket(runs, outcomes.right.shape[1])
  return outcomes.right[np.arange(len(last)), last]


@dataclasses.dataclass(frozen=True)
class BucketCosts:
  """Multiply-adds an image, exact.

  Attributes:
    trunk: of the part that runs for every image.
    branches: (K,) int64, of each bucket's branch.
    indices: (K,) of the buckets among the model's sub-networks; None means the
      first K.
  """

  trunk: int
  branches: np.ndarray
  indices: Sequence[int] | None = None

  def __post_init__(self):
    if self.indices is None:
      object.__setattr__(self, 'indices', tuple(range(len(self.branches))))

  @classmethod
  def of_model(cls, model, image_size: int) -> 'BucketCosts':
    """Counts a model's buckets, for images of this size."""
    parts = [model.cost_in_parts(s, image_size) for s in model.routing_space]
    branches = np.asarray([branch.madds for _, branch in parts], np.int64)
    indices = tuple(s.index for s in model.routing_space)
    return cls(parts[0][0].madds, branches, indices)

  @property
  def buckets(self) -> np.ndarray:
    """(K,) int64, of the trunk and one branch."""
    return self.trunk + self.branches

  def of_runs(self, runs: np.ndarray) -> np.ndarray:
    """Returns (N,) int64: the trunk, and every branch in runs (N, R)."""
    branches = np.append(self.branches, 0)
    return self.trunk + branches[runs].sum(1)
