"""Budgets: a router that spends what is asked, on average.

A dial turns the mean MAdds that an image may cost into a router's numbers, by
what the buckets and the gate said of images that no training has seen. Turning
it runs no network.

Axes: M images held out, K buckets, C classes, R runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from absl import logging

from ds_jax.routing import outcomes as outcomes_lib
from ds_jax.routing import router as routers

# An interval of prices or thresholds is narrowed to a part in 10^12.
_NUM_PLACES = 15
_NUM_ROUNDS = 10
# Of the budget: what a router may miss it by on the dial's own images.
_TOLERANCE = 0.02


class BudgetError(ValueError):
  """A budget that a router can't keep."""


class Dial(Protocol):
  """From a budget to a router."""

  limits: tuple[int, int]  # the least and the most MAdds that an image costs

  def router(self, madds: float) -> routers.Router:
    """Returns the router that spends `madds` an image, on average.

    Raises:
      BudgetError: if that is out of reach.
    """


class GateDial:
  """The gate's bucket, with a price on MAdds.

  The bucket of the largest `utility - price * MAdds`: one price moves all
  offsets. Where utilities are probabilities of a right answer, no other rule on
  them is right more often at the same cost.

  Attributes:
    limits: the costs of the cheapest and the largest bucket.
  """

  def __init__(
    self,
    outcomes: outcomes_lib.Outcomes,
    costs: outcomes_lib.BucketCosts,
    utility: str = 'logits',
  ):
    """Computes nothing yet.

    Args:
      outcomes: of M images held out.
      costs: of the buckets.
      utility: see `Router`.
    """
    buckets = costs.buckets
    self.limits = int(buckets.min()), int(buckets.max())
    self._outcomes, self._costs, self._utility = outcomes, costs, utility

  def router(self, madds: float) -> routers.Router:
    """See `Dial`."""
    check_budget(madds, self.limits)
    buckets = self._costs.buckets
    if madds in self.limits:
      only = np.where(buckets == madds, 0, -np.inf)
      return routers.gate_router(only, self._utility)
    low, high = self.limits
    shares = (buckets - low) / (high - low)
    # A price that outweighs every difference of utilities.
    steepest = (np.ptp(self._outcomes.gate_logits) + 1) / np.diff(
      np.unique(shares)
    ).min()
    return _search(
      lambda price: routers.gate_router(-price * shares, self._utility),
      (steepest, -steepest),
      madds,
      self._outcomes,
      self._costs,
    )


class CascadeDial:
  """A ladder of buckets, climbed while the answer is unsure.

  All rungs have one threshold, on the probability that their answer is right: a
  logistic regression for each reads that off the score.

  Attributes:
    limits: the cost of the first rung, and of all together.
  """

  def __init__(
    self,
    outcomes: outcomes_lib.Outcomes,
    costs: outcomes_lib.BucketCosts,
    ladder: Sequence[int] | None = None,
    score: str = 'margin',
  ):
    """Fits the regressions.

    Args:
      outcomes: of M images held out.
      costs: of the buckets.
      ladder: R buckets, rising; None means the first and the last.
      score: one of `SCORES`.

    Raises:
      ValueError: for a ladder that does not rise, or another score.
    """
    num_buckets = len(costs.branches)
    ladder = tuple((0, num_buckets - 1) if ladder is None else ladder)
    routers.check_cascade(num_buckets, ladder, score)
    learned = None
    if score == 'learned' and len(ladder) > 1:
      learned = fit_learned_score(outcomes, ladder[:-1])
    self._outcomes, self._costs = outcomes, costs
    self._make = functools.partial(
      routers.cascade_router,
      num_buckets,
      ladder,
      score=score,
      learned=learned,
    )
    self._num_thresholds = len(ladder) - 1
    router = self._make([0] * self._num_thresholds)
    self.limits = (
      int(costs.buckets[ladder[0]]),
      int(costs.trunk + costs.branches[list(ladder)].sum()),
    )
    self._lines, log_odds = [], []
    for rung in ladder[:-1]:
      scores = np.asarray(router.score_of(outcomes.confidence_at(rung)))
      slope, bias = _fit_log_odds(scores, outcomes.right[:, rung])
      self._lines.append((slope, bias))
      log_odds += [slope * scores.min() + bias, slope * scores.max() + bias]
    self._interval = (min(log_odds) - 1, max(log_odds) + 1) if log_odds else ()

  def router(self, madds: float) -> routers.Router:
    """See `Dial`."""
    check_budget(madds, self.limits)
    if madds in self.limits:
      end = -np.inf if madds == self.limits[0] else np.inf
      return self._make([end] * self._num_thresholds)
    return _search(
      lambda log_odds: self._make(
        [(log_odds - bias) / slope for slope, bias in self._lines]
      ),
      self._interval,
      madds,
      self._outcomes,
      self._costs,
    )


@dataclasses.dataclass(frozen=True)
class GateTarget:
  """What a gate was trained for; the fields are those of `GateConfig`.

  Attributes:
    target: `sandwich` or `correctness`.
    target_madds: what an image is to cost in the mean; None leaves the gate as
      it was trained.
  """

  target: str = 'sandwich'
  target_madds: float | None = None

  @property
  def utility(self) -> str:
    """What the gate's utilities are; see `routers.Router`."""
    return {'sandwich': 'logits', 'correctness': 'probability'}[self.target]


def gate_at_target(
  outcomes: outcomes_lib.Outcomes | None,
  costs: outcomes_lib.BucketCosts,
  gate_target: GateTarget,
) -> routers.Router:
  """Returns the gate as it routes unless it is told another budget.

  Args:
    outcomes: of images held out; None leaves the gate as it was trained.
    costs: of the buckets.
    gate_target: one that the gate can't keep leaves it as it was trained, with
      a warning.
  """
  madds, utility = gate_target.target_madds, gate_target.utility
  if outcomes is not None and madds is not None:
    try:
      return GateDial(outcomes, costs, utility).router(madds)
    except BudgetError as error:
      logging.warning('gate.target_madds is not kept. %s', error)
  return routers.gate_router(np.zeros(len(costs.branches)), utility)


def fit_learned_score(
  outcomes: outcomes_lib.Outcomes, buckets: Sequence[int]
) -> routers.LearnedScore:
  """Fits the log odds that these buckets' answers are right.

  A logistic regression on the scores and the class, of all the buckets' answers
  together.
  """
  # Imported here: it takes over a second, and no other router needs it.
  from sklearn import linear_model

  confidences = [outcomes.confidence_at(bucket) for bucket in buckets]
  scores = np.concatenate([np.asarray(c.scores) for c in confidences])
  labels = np.concatenate([np.asarray(c.labels) for c in confidences])
  right = np.concatenate([outcomes.right[:, bucket] for bucket in buckets])
  scale = np.maximum(scores.std(0), 1e-6)
  num_classes = int(labels.max()) + 1
  inputs = np.concatenate([scores / scale, np.eye(num_classes)[labels]], axis=1)
  if len(np.unique(right)) < 2:
    return routers.LearnedScore(1 / scale, np.zeros(num_classes))
  model = linear_model.LogisticRegression(max_iter=1000).fit(inputs, right)
  weights = model.coef_[0]
  return routers.LearnedScore(
    (weights[:3] / scale).astype(np.float32), weights[3:].astype(np.float32)
  )


def _fit_log_odds(scores, right) -> tuple[float, float]:
  """Slope and bias of the log odds of `right`, that rise with the scores."""
  from sklearn import linear_model

  mean, scale = scores.mean(), max(scores.std(), 1e-6)
  if len(np.unique(right)) == 2:
    model = linear_model.LogisticRegression()
    model.fit((scores[:, None] - mean) / scale, right)
    slope = model.coef_[0, 0]
    if slope > 0:
      return slope / scale, model.intercept_[0] - slope * mean / scale
  # Nothing to learn from; any rising line gives a threshold.
  return 1 / scale, -mean / scale


def mean_madds(
  router: routers.Router,
  outcomes: outcomes_lib.Outcomes,
  costs: outcomes_lib.BucketCosts,
) -> float:
  """Returns what the router spends on an image, on average."""
  return float(costs.of_runs(outcomes_lib.replay(router, outcomes)).mean())


def check_budget(madds: float, limits: tuple[int, int]) -> None:
  """Raises BudgetError unless the budget is within the limits."""
  low, high = limits
  if not low <= madds <= high:
    raise BudgetError(
      f'A budget of {madds:,.0f} MAdds an image is out of reach: this router'
      f' spends {low:,} to {high:,}.'
    )


def _search(
  make: Callable[[float], routers.Router],
  interval: tuple[float, float],
  madds: float,
  outcomes: outcomes_lib.Outcomes,
  costs: outcomes_lib.BucketCosts,
) -> routers.Router:
  """Finds the router of an interval, cheap end first, that spends `madds`.

  Of all that spend the same it is the one in the middle: at the end of them an
  image would be on the edge, and go either way by how its scores are rounded.
  """

  def spent(places):
    # As many as in a round, whatever is asked, so that one program will do.
    asked = np.resize(places, _NUM_PLACES)
    stacked = jax.tree.map(lambda *x: np.stack(x), *map(make, asked))
    runs = outcomes_lib.replay_each(stacked, outcomes)
    return costs.of_runs(runs).mean(-1)[: len(places)]

  ends = _narrowed(lambda places: spent(places) <= madds, interval)
  nearest, reached = min(
    zip(ends, spent(ends), strict=True), key=lambda end: abs(end[1] - madds)
  )
  # One image more or less is as near as any router comes.
  step = np.ptp(costs.buckets) / len(outcomes)
  if abs(reached - madds) > _TOLERANCE * madds + step:
    raise BudgetError(
      f'A budget of {madds:,.0f} MAdds an image falls into a gap: this router'
      f' can spend {reached:,.0f}, and then too much at once, since it cannot'
      ' tell many images apart. Take another budget or router.'
    )
  ends = [
    _narrowed(lambda places: spent(places) == reached, (nearest, end))[0]
    for end in interval
  ]
  return make(sum(ends) / 2)


def _narrowed(
  holds: Callable[[np.ndarray], np.ndarray], interval: tuple[float, float]
) -> tuple[float, float]:
  """Returns two numbers close together, of which it holds at the first alone.

  It holds at one end of the interval, the first, and up to somewhere.

  Args:
    holds: of P numbers, to whether it holds at each.
    interval: its ends.
  """
  for _ in range(_NUM_ROUNDS):
    places = np.linspace(*interval, _NUM_PLACES + 2)
    # Those of the first number at which it does not hold, and the one before.
    last = int(np.argmin([*holds(places[1:-1]), False]))
    interval = places[last], places[last + 1]
  return interval
