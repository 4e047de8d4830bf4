"""Routers: which buckets run for an image.

A router picks an image's first bucket from the gate's logits. Once that has
run, the image stops or goes on to a larger bucket, by how confident the answer
is; every bucket starts from the trunk's features, which are there already.

Axes: N images, K buckets, C classes, R runs that an image has at most.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import validation
from ds_jax.routing import dispatch

SCORES = ('probability', 'margin', 'entropy', 'learned')
UTILITIES = ('logits', 'probability')

Answers = Any


@flax.struct.dataclass
class Confidence:
  """What is known of how far an answer can be trusted.

  Attributes:
    scores: (..., 3) float32, the higher the surer, in the order of `SCORES`:
      the log odds of the most probable class, its logit less the second's, and
      the negative entropy. None of them rounds to the same number for all sure
      answers, as a probability does at 1.
    labels: (...) int32, the most probable class.
  """

  scores: jax.Array
  labels: jax.Array


def confidence_of(logits: jax.Array) -> Confidence:
  """Measures logits (..., C)."""
  (largest, second), (label, _) = (
    jnp.moveaxis(x, -1, 0) for x in jax.lax.top_k(logits, 2)
  )
  is_label = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  below = logits - largest[..., None]
  others = jnp.where(is_label, -jnp.inf, below)
  log_odds = -jax.nn.logsumexp(others, axis=-1)
  # -sum p log p, of positive terms alone, so that a small one keeps its digits.
  share = jnp.exp(others)
  total = share.sum(-1)
  entropy = jnp.log1p(total) - (share * jnp.where(is_label, 0, below)).sum(
    -1
  ) / (1 + total)
  scores = jnp.stack([log_odds, largest - second, -entropy], axis=-1)
  return Confidence(scores.astype(jnp.float32), label.astype(jnp.int32))


@flax.struct.dataclass
class LearnedScore:
  """A linear head on the scores and the class: the higher, the surer.

  Attributes:
    weights: (3,) of `Confidence.scores`.
    biases: (C,) of the classes; a class past the last has none.
  """

  weights: jax.Array
  biases: jax.Array

  def __call__(self, confidence: Confidence) -> jax.Array:
    """Returns (...)."""
    scores = jnp.dot(confidence.scores, self.weights, precision='highest')
    biases = jnp.asarray(self.biases)
    return scores + biases.at[confidence.labels].get(mode='fill', fill_value=0)


@flax.struct.dataclass
class Router:
  """A rule. Its numbers are arrays: another budget compiles nothing.

  Attributes:
    offsets: (K,) added to the gate's utilities; the largest sum is the first
      bucket.
    thresholds: (R - 1,) an answer goes on to the next run that is below it.
    learned: the head of the score `learned`.
    runs: the buckets that each run may be of; after the first run, one each.
    score: one of `SCORES`, that the thresholds are of.
    utility: what the gate's utilities are: its `logits`, or the `probability`
      that each logit is the log odds of.
  """

  offsets: jax.Array
  thresholds: jax.Array
  learned: LearnedScore | None = None
  runs: tuple[tuple[int, ...], ...] = flax.struct.field(
    pytree_node=False, default=()
  )
  score: str = flax.struct.field(pytree_node=False, default='margin')
  utility: str = flax.struct.field(pytree_node=False, default='logits')

  @property
  def num_buckets(self) -> int:
    """K."""
    return len(self.offsets)

  @property
  def uses_gate(self) -> bool:
    """Whether the first bucket depends on the image."""
    return len(self.runs[0]) > 1

  def first_bucket(self, gate_logits: jax.Array) -> jax.Array:
    """Returns (N,) int32 in [0, K), of the gate's logits (N, K)."""
    if not self.uses_gate:
      return jnp.full(len(gate_logits), self.runs[0][0], jnp.int32)
    utilities = gate_logits
    if self.utility == 'probability':
      utilities = jax.nn.sigmoid(gate_logits)
    return (utilities + self.offsets[None]).argmax(-1).astype(jnp.int32)

  def next_bucket(
    self, run: int, bucket: jax.Array, confidence: Confidence
  ) -> jax.Array:
    """Returns (N,) int32, the bucket of a run after the first; K stops.

    Args:
      run: static, from 1.
      bucket: (N,) that gave the answer so far.
      confidence: (N,) of that answer.
    """
    (following,) = self.runs[run]
    unsure = self.score_of(confidence) < self.thresholds[run - 1]
    return jnp.where(
      unsure & (bucket < following), following, self.num_buckets
    ).astype(jnp.int32)

  def score_of(self, confidence: Confidence) -> jax.Array:
    """Returns (...), what the thresholds are compared with."""
    if self.score == 'learned':
      return self.learned(confidence)
    return confidence.scores[..., SCORES.index(self.score)]


def gate_router(
  offsets: jax.Array | Sequence[float], utility: str = 'logits'
) -> Router:
  """Returns the router of one run: the bucket that the gate prefers.

  Args:
    offsets: (K,) of the buckets.
    utility: one of `UTILITIES`.

  Raises:
    ValueError: for another utility.
  """
  validation.check_choice('utility', utility, UTILITIES)
  offsets = np.asarray(offsets, np.float32)
  return Router(
    offsets,
    np.zeros(0, np.float32),
    runs=(tuple(range(len(offsets))),),
    utility=utility,
  )


def cascade_router(
  num_buckets: int,
  ladder: Sequence[int],
  thresholds: Sequence[float],
  score: str = 'margin',
  learned: LearnedScore | None = None,
) -> Router:
  """Returns the router that tries the buckets of a ladder until one is sure.

  Args:
    num_buckets: K.
    ladder: R buckets, rising.
    thresholds: R - 1 numbers, of the answers of all buckets but the last.
    score: one of `SCORES`.
    learned: the head, for the score `learned`.

  Raises:
    ValueError: for a ladder that does not rise, or another score.
  """
  check_cascade(num_buckets, ladder, score)
  return Router(
    np.zeros(num_buckets, np.float32),
    np.asarray(thresholds, np.float32).reshape(len(ladder) - 1),
    learned,
    runs=tuple((int(bucket),) for bucket in ladder),
    score=score,
  )


def check_cascade(num_buckets: int, ladder: Sequence[int], score: str) -> None:
  """Raises ValueError for a ladder that does not rise, or another score."""
  validation.check_choice('score', score, SCORES)
  rungs = [bucket for bucket in range(num_buckets) if bucket in ladder]
  if not ladder or list(ladder) != rungs:
    raise ValueError(
      f'ladder={tuple(ladder)}: expected one or more of the buckets 0 to'
      f' {num_buckets - 1}, rising.'
    )


class Network(NamedTuple):
  """A network in parts, as functions of arrays alone.

  Attributes:
    trunk: images (N, H, W, 3) to features (N, ...).
    gate_logits: features to (N, K).
    branches: K functions of features (n, ...) to logits (n, C), n static but
      any.
  """

  trunk: Callable[[jax.Array], jax.Array]
  gate_logits: Callable[[jax.Array], jax.Array]
  branches: Sequence[dispatch.Branch]


class Routed(NamedTuple):
  """Images that went through a router.

  Attributes:
    runs: (N, R) int32, the buckets that ran, in order; K where none did.
    logits: (N, C) of the last one.
  """

  runs: jax.Array
  logits: jax.Array


def route(router: Router, network: Network, images: jax.Array) -> Routed:
  """Runs for every image what the router says, and nothing else.

  Args:
    router: the rule.
    network: of K buckets.
    images: (N, H, W, 3), as the trunk takes them.
  """
  features = network.trunk(images)
  if router.uses_gate:
    gate_logits = network.gate_logits(features)
  else:
    gate_logits = jnp.zeros((len(features), router.num_buckets))

  def run_buckets(run, buckets):
    allowed = router.runs[run]
    if run == 0 and len(allowed) == 1:
      return network.branches[allowed[0]](features)
    # The place among those allowed; one past the last for those that stop.
    # Not a binary search, which would be a loop on the device.
    places = (buckets[:, None] > jnp.asarray(allowed)[None]).sum(-1)
    branches = [network.branches[bucket] for bucket in allowed]
    return dispatch.dispatch_images(places, branches, features)

  return Routed(*walk(router, gate_logits, run_buckets, confidence_of))


def walk(
  router: Router,
  gate_logits: jax.Array,
  run_buckets: Callable[[int, jax.Array], Answers],
  confidence_of: Callable[[Answers], Confidence],
) -> tuple[jax.Array, Answers]:
  """Applies the rule.

  Args:
    router: the rule.
    gate_logits: (N, K).
    run_buckets: of a run's number and buckets (N,), K for none, to their
      answers, a tree of arrays (N, ...); anything where none runs.
    confidence_of: answers to their confidence (N,).

  Returns:
    (N, R) int32, the buckets that ran, in order, K where none did; and the
    last answers.
  """
  buckets = router.first_bucket(gate_logits)
  answers = run_buckets(0, buckets)
  history, last = [buckets], buckets
  for run in range(1, len(router.runs)):
    following = router.next_bucket(run, last, confidence_of(answers))
    # An image that has stopped stays so.
    goes_on = (buckets < router.num_buckets) & (following < router.num_buckets)
    buckets = jnp.where(goes_on, following, router.num_buckets)
    last = jnp.where(goes_on, following, last)
    answers = jax.tree.map(
      functools.partial(jax.vmap(jnp.where), goes_on),
      run_buckets(run, buckets),
      answers,
    )
    history.append(buckets)
  return jnp.stack(history, axis=1), answers


def last_bucket(runs: np.ndarray, num_buckets: int) -> np.ndarray:
  """Returns (N,), the last bucket that ran, of (N, R); on the host."""
  return np.where(runs < num_buckets, runs, -1).max(-1)
