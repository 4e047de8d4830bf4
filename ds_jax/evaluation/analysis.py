"""What a router is worth, over its whole range of budgets.

A router earns its place if, at the same mean MAdds, it is right more often than
a coin that mixes the static sub-networks. Pure functions of outcomes.

Axes: N images, K buckets, G budgets.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ds_jax import routing


@dataclasses.dataclass(frozen=True)
class Point:
  """A router at one budget, and what it has to be compared with there.

  Attributes:
    budget: the mean MAdds that were asked for.
    madds: spent on an image, on average.
    madds_error: standard error of that mean.
    top1: share of right answers.
    hull: what the best coin gets for the same MAdds; see `static_hull`.
    oracle: what the oracle gets for them; see `oracle_top1`.
    gain: top1 - hull.
    gain_error: standard error of the gain, paired over the images.
    captured: gain / (oracle - hull), the share of what there is to gain; None
      where there is nothing.
  """

  budget: float
  madds: float
  madds_error: float
  top1: float
  hull: float
  oracle: float
  gain: float
  gain_error: float
  captured: float | None


def hull_corners(madds: np.ndarray, top1: np.ndarray) -> list[int]:
  """Returns the buckets at the corners of the upper concave hull.

  Each corner costs more than the one before it and is right more often; the
  last is the cheapest of the best, since a coin need not spend everything.

  Args:
    madds: (K,) of the buckets.
    top1: (K,) of the buckets, in any unit.
  """
  corners = [int(np.lexsort((-top1, madds))[0])]
  while (better := np.flatnonzero(top1 > top1[corners[-1]])).size:
    # No bucket as cheap as the last corner is better, so these are larger.
    slopes = (top1[better] - top1[corners[-1]]) / (
      madds[better] - madds[corners[-1]]
    )
    corners.append(int(better[slopes.argmax()]))
  return corners


def static_hull(
  madds: float, right: np.ndarray, costs: routing.BucketCosts
) -> np.ndarray:
  """Returns (N,), how often the best coin between buckets is right on an image.

  Mixing static sub-networks reaches the upper concave hull of their costs and
  accuracies, and no more: between two of its corners, which need not be
  neighbours, lies a coin between those two. Below the cheapest sub-network it
  is that one, past the best the best.

  Args:
    madds: that the coin may spend, on average.
    right: (N, K) bool.
    costs: of the buckets, cheapest first.
  """
  # Counts are exact, so that a bucket on the hull's edge is always a corner.
  corners = hull_corners(costs.buckets, right.sum(0))
  spent = costs.buckets[corners]
  shares = [np.interp(madds, spent, one) for one in np.eye(len(corners))]
  return right[:, corners] @ np.array(shares)


def oracle_top1(
  madds: float, right: np.ndarray, costs: routing.BucketCosts
) -> float:
  """Returns the most right answers that anyone can buy with `madds`.

  Who knows which buckets are right sends every image to the cheapest bucket,
  and then those it gets wrong to their cheapest right one, the cheapest of
  these first, until the MAdds are spent.

  Args:
    madds: mean over the images, at least the cheapest bucket's.
    right: (N, K) bool.
    costs: of the buckets, cheapest first.
  """
  num_images = len(right)
  first_right = right.argmax(1)
  mendable = right.any(1) & ~right[:, 0]
  extra = np.sort((costs.buckets - costs.buckets[0])[first_right[mendable]])
  left = (madds - costs.buckets[0]) * num_images
  spent = np.cumsum(extra)
  whole = int(np.searchsorted(spent, left, side='right'))
  mended = float(whole)
  if whole < len(extra):
    mended += (left - (spent[whole - 1] if whole else 0)) / extra[whole]
  return float(right[:, 0].mean() + mended / num_images)


def measure(
  runs: np.ndarray,
  asked: float,
  outcomes: routing.Outcomes,
  costs: routing.BucketCosts,
) -> Point:
  """Holds a router against the hull and the oracle.

  Args:
    runs: (N, R), as `replay` gives them.
    asked: the budget.
    outcomes: of the N images.
    costs: of the buckets, cheapest first.
  """
  spent = costs.of_runs(runs)
  madds = float(spent.mean())
  right = routing.right_answers(runs, outcomes)
  hull = static_hull(madds, outcomes.right, costs)
  difference = right - hull
  oracle = oracle_top1(madds, outcomes.right, costs)
  gain, reach = float(difference.mean()), oracle - float(hull.mean())
  return Point(
    budget=float(asked),
    madds=madds,
    madds_error=float(spent.std() / np.sqrt(len(spent))),
    top1=float(right.mean()),
    hull=float(hull.mean()),
    oracle=oracle,
    gain=gain,
    gain_error=float(difference.std() / np.sqrt(len(difference))),
    captured=gain / reach if reach > 0 else None,
  )


def curve(
  dial: routing.Dial,
  budgets: Sequence[float],
  outcomes: routing.Outcomes,
  costs: routing.BucketCosts,
) -> list[Point]:
  """Returns a router's points at those budgets that it can keep.

  Args:
    dial: of the router.
    budgets: (G,) mean MAdds.
    outcomes: of the images to measure on.
    costs: of the buckets, cheapest first.
  """
  points = []
  for madds in budgets:
    try:
      router = dial.router(madds)
    except routing.BudgetError:
      continue
    runs = routing.replay(router, outcomes)
    points.append(measure(runs, madds, outcomes, costs))
  return points
