"""What every bucket and the gate say of labelled images, and what buckets cost.

Enough to tell what any router would do with these images, and far smaller than
the logits.

Axes: N images, K buckets, C classes, R runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ds_jax.routing import router as routers


@flax.struct.dataclass
class Outcomes:
  """Outcomes of N images.

  Attributes:
    gate_logits: (N, K).
    confidence: (N, K) of every bucket's answer.
    right: (N, K) bool, whether the answer is the label.
  """

  gate_logits: jax.Array
  confidence: routers.Confidence
  right: jax.Array

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
  right = confidence.labels == labels[:, None]
  return Outcomes(gate_logits, confidence, right)


def images_held_out(tree: Mapping[str, Any]) -> Outcomes | None:
  """Returns the outcomes in a finished run's checkpoint; None if it has none.

  Args:
    tree: the arrays of the checkpoint.
  """
  if 'outcomes' not in tree:
    return None
  saved = jax.tree.map(np.asarray, tree['outcomes'])
  outcomes = Outcomes(
    saved['gate_logits'],
    routers.Confidence(**saved['confidence']),
    saved['right'],
  )
  if 'mask' in tree:  # Of format 1: True where there is an image.
    mask = np.asarray(tree['mask'])
    outcomes = jax.tree.map(lambda x: x[mask], outcomes)
  return outcomes if len(outcomes) else None


def replay(router: routers.Router, outcomes: Outcomes) -> np.ndarray:
  """Returns (N, R) int32, the buckets that the router would run; K for none."""
  runs = _replay_one(router, outcomes.gate_logits, outcomes.confidence)
  return np.asarray(runs)


def replay_each(stacked: routers.Router, outcomes: Outcomes) -> np.ndarray:
  """Returns (P, N, R) int32, as `replay` of each of P routers of one kind.

  Args:
    stacked: their arrays, with an axis of P before all others.
    outcomes: of N images.
  """
  runs = _replay_each(stacked, outcomes.gate_logits, outcomes.confidence)
  return np.asarray(runs)


def _replay(router, gate_logits, confidence):
  images = jnp.arange(len(gate_logits))

  def answers(run, buckets):
    del run
    # One that has stopped is not asked again, so its answer may be any.
    known = jnp.minimum(buckets, router.num_buckets - 1)
    return jax.tree.map(lambda x: x[images, known], confidence)

  runs, _ = routers.walk(router, gate_logits, answers, lambda known: known)
  return runs


# Jitted, since a budget is found by asking hundreds of routers.
_replay_one = jax.jit(_replay)
_replay_each = jax.jit(jax.vmap(_replay, (0, None, None)))


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
    """Returns (...) int64: the trunk, and every branch in runs (..., R)."""
    branches = np.append(self.branches, 0)
    return self.trunk + branches[runs].sum(-1)
