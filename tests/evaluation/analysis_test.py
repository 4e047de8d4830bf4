"""What routers are worth, against brute force, linear programmes and loops."""

import itertools
import math

import numpy as np
import pytest
from absl.testing import parameterized
from scipy import optimize

from ds_jax import evaluation, routing
from ds_jax.evaluation import analysis
from ds_jax.routing import router as routers

_COSTS = routing.BucketCosts(100, np.array([20, 60, 300]))


def _outcomes(right, margins=None, gate_logits=None):
  """Outcomes of which only what is given says anything."""
  right = np.asarray(right, bool)
  scores = np.zeros((*right.shape, 3), np.float32)
  if margins is not None:
    scores[..., routers.SCORES.index('margin')] = margins
  return routing.Outcomes(
    np.zeros(right.shape, np.float32) if gate_logits is None else gate_logits,
    routers.Confidence(scores, np.zeros(right.shape, np.int32)),
    right,
  )


def _random_right(num_images, seed=0, shares=(0.5, 0.6, 0.8)):
  generator = np.random.default_rng(seed)
  return generator.random((num_images, len(shares))) < np.array(shares)


def _best_coin(madds, top1, buckets):
  """The best that shares of the buckets get, by a linear programme."""
  found = optimize.linprog(
    -np.asarray(top1, float),
    A_ub=[buckets],
    b_ub=[madds],
    A_eq=np.ones((1, len(buckets))),
    b_eq=[1],
  )
  assert found.success
  return -found.fun


def _right_by_counts(counts, num_images):
  """(N, K), the first so many images right."""
  return np.arange(num_images)[:, None] < np.array(counts)


class StaticHullTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2, 3, 4, 5), num_buckets=(1, 2, 4, 14))
  def test_is_the_best_that_any_shares_of_the_buckets_get(
    self, seed, num_buckets
  ):
    generator = np.random.default_rng(seed)
    # Accuracies that rise and fall, and now and then equal ones and costs.
    right = generator.random((9, num_buckets)) < 0.5
    branches = np.sort(generator.integers(0, 3 * num_buckets, num_buckets))
    costs = routing.BucketCosts(7, branches)
    low, high = costs.buckets[[0, -1]]
    budgets = [*costs.buckets, *np.linspace(low, high, 7), high + 1, 10 * high]
    for madds in budgets:
      hull = analysis.static_hull(madds, right, costs)
      assert hull.shape == (9,)
      best = _best_coin(madds, right.mean(0), costs.buckets)
      # The programme is solved to 1e-7 or better.
      assert hull.mean() == pytest.approx(best, abs=1e-7)

  def test_mixes_buckets_that_are_no_neighbours(self):
    # Costs in percent, and answers of 10,000, of a network that was trained.
    counts = [9015, 9023, 9072, 9092]
    costs = routing.BucketCosts(20, np.array([2, 15, 42, 80]))
    right = _right_by_counts(counts, 10_000)
    assert evaluation.hull_corners(costs.buckets, right.sum(0)) == [0, 2, 3]
    hull = analysis.static_hull(40, right, costs).mean()
    # 18 of the 40 percent from the first to the third; neighbours get 0.9032.
    assert hull == pytest.approx(0.9015 + 0.0057 * 18 / 40, abs=1e-12)

  def test_never_falls_and_is_the_best_from_there_on(self):
    right = _right_by_counts([2, 8, 5], 10)
    assert evaluation.hull_corners(_COSTS.buckets, right.sum(0)) == [0, 1]
    for madds in (160, 250, 400, 5000):
      np.testing.assert_array_equal(
        analysis.static_hull(madds, right, _COSTS), right[:, 1]
      )

  def test_below_the_cheapest_it_is_the_cheapest(self):
    right = _random_right(30)
    np.testing.assert_array_equal(
      analysis.static_hull(50, right, _COSTS), right[:, 0]
    )

  def test_is_a_coin_between_two_buckets_on_each_image(self):
    right = np.array(list(itertools.product([False, True], repeat=3)))
    # All are right as often: then the cheapest. One more for the last.
    right = np.append(right, [[False, False, True]], axis=0)
    hull = analysis.static_hull(190, right, _COSTS)
    hand = [0.75 * first + 0.25 * last for first, _, last in right]
    np.testing.assert_array_equal(hull, hand)

  def test_a_bucket_on_the_edge_is_mixed_with_its_neighbours(self):
    # 3, 4 and 10 right: on one straight line.
    right = _right_by_counts([3, 4, 10], 11)
    hull = analysis.static_hull(220, right, _COSTS)
    np.testing.assert_array_equal(hull, right[:, 1:] @ [0.75, 0.25])


def _best_assignment(madds, right, buckets):
  """The best that assignments of images get, by trying them all.

  A coin between two assignments is one too, which is what a fraction of an
  image amounts to.
  """
  num_images = len(right)
  points = {
    (sum(buckets[k] for k in a), sum(right[i][k] for i, k in enumerate(a)))
    for a in itertools.product(range(len(buckets)), repeat=num_images)
  }
  affordable = [p for p in points if p[0] <= madds * num_images]
  best = max(answers for _, answers in affordable)
  for low, high in itertools.product(affordable, points):
    if high[0] > madds * num_images:
      share = (madds * num_images - low[0]) / (high[0] - low[0])
      best = max(best, (1 - share) * low[1] + share * high[1])
  return best / num_images


class OracleTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1, 2, 3, 4, 5), share=(0.0, 0.03, 0.2, 0.31, 0.7, 1.0)
  )
  def test_equals_the_best_of_all_assignments(self, seed, share):
    right = _random_right(4, seed, shares=(0.3, 0.4, 0.6))
    madds = 120 + share * 280
    # Float64 sums of a few numbers up to 1600.
    assert analysis.oracle_top1(madds, right, _COSTS) == pytest.approx(
      _best_assignment(madds, right.tolist(), [120, 160, 400]), abs=1e-12
    )

  @parameterized.parameters(0, 1, 2)
  def test_equals_the_cheapest_right_bucket_at_its_cost(self, seed):
    right = _random_right(200, seed)
    spent, answers = 0, 0
    for row in right:
      bucket = list(row).index(True) if True in row else 0
      spent += [120, 160, 400][bucket]
      answers += row[bucket]
    # A float64 mean of MAdds, off by 1e-13 of an image.
    assert analysis.oracle_top1(spent / 200, right, _COSTS) == pytest.approx(
      answers / 200, abs=1e-12
    )
    # It is the least that buys them all.
    less = analysis.oracle_top1(spent / 200 - 1, right, _COSTS)
    assert less < answers / 200 - 1e-3
    assert analysis.oracle_top1(400, right, _COSTS) == pytest.approx(
      answers / 200, abs=1e-12
    )

  def test_never_falls_with_the_budget_nor_below_the_hull(self):
    right = _random_right(50, 3, shares=(0.5, 0.8, 0.6))
    budgets = np.linspace(120, 400, 57)
    oracle = [analysis.oracle_top1(m, right, _COSTS) for m in budgets]
    # Float64 sums of 50 numbers up to 1.
    assert np.all(np.diff(oracle) >= -1e-12)
    hull = [analysis.static_hull(m, right, _COSTS).mean() for m in budgets]
    assert np.all(np.array(oracle) >= np.array(hull) - 1e-12)


class MeasureTest(parameterized.TestCase):
  def test_equals_a_hand_computation(self):
    right = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    runs = np.array([[0], [1], [2], [0], [0], [1]])
    point = analysis.measure(runs, 190, _outcomes(right), _COSTS)
    spent = [120, 160, 400, 120, 120, 160]
    madds = sum(spent) / 6  # 180, a twelfth of the way from 160 to 400
    answers = [1, 1, 1, 1, 0, 1]
    hull = [11 / 12 * r[1] + 1 / 12 * r[2] for r in right]
    gains = [a - b for a, b in zip(answers, hull, strict=True)]
    gain = sum(gains) / 6
    # Of 360 MAdds past the cheapest: two images at 40 each, and the last 280.
    oracle = 5 / 6
    expected = analysis.Point(
      budget=190.0,
      madds=180.0,
      madds_error=_error(spent),
      top1=5 / 6,
      hull=sum(hull) / 6,
      oracle=oracle,
      gain=gain,
      gain_error=_error(gains),
      captured=gain / (oracle - sum(hull) / 6),
    )
    assert madds == 180
    for name, value in vars(expected).items():
      # Float64 sums of six numbers.
      assert getattr(point, name) == pytest.approx(value, rel=1e-12), name

  def test_a_bucket_below_the_hull_loses(self):
    right = _right_by_counts([4, 4, 9], 10)
    point = analysis.measure(np.ones((10, 1), int), 0, _outcomes(right), _COSTS)
    # For 160 MAdds a seventh of the images get the last bucket.
    gains = [r[1] - (6 / 7 * r[0] + 1 / 7 * r[2]) for r in right]
    # Float64 sums of ten numbers.
    assert point.gain == pytest.approx(sum(gains) / 10, rel=1e-12)
    assert point.gain == pytest.approx(-5 / 70, rel=1e-12)
    assert point.gain_error == pytest.approx(_error(gains), rel=1e-12)

  def test_captured_is_one_of_the_oracle_and_none_of_the_hull(self):
    right = _random_right(100)
    cheapest_right = right.argmax(1)[:, None]
    point = analysis.measure(cheapest_right, 0, _outcomes(right), _COSTS)
    # Float64 sums of 100 numbers up to 1.
    assert point.captured == pytest.approx(1, abs=1e-10)
    assert point.gain > 0.1
    everything = np.full((100, 1), 1)
    point = analysis.measure(everything, 0, _outcomes(right), _COSTS)
    assert point.captured == pytest.approx(0, abs=1e-10)
    assert point.gain_error == pytest.approx(0, abs=1e-10)

  @parameterized.parameters(
    # Nothing to mend, whatever is spent; and nothing to spend.
    *itertools.product(('alike', 'cheapest'), (0, 1, 2))
  )
  def test_captured_is_none_where_there_is_nothing_to_gain(self, kind, seed):
    generator = np.random.default_rng(seed)
    if kind == 'alike':
      right = np.repeat(_random_right(37, seed)[:, :1], 3, axis=1)
      runs = generator.integers(0, 3, (37, 1))
    else:
      right = _random_right(37, seed)
      runs = np.zeros((37, 1), np.int64)
    point = analysis.measure(runs, 0, _outcomes(right), _COSTS)
    assert point.gain == pytest.approx(0, abs=1e-15)
    assert point.captured is None

  def test_a_cascade_that_spends_past_the_largest_is_held_against_it(self):
    right = _random_right(40)
    runs = np.tile([0, 2], (40, 1))
    point = analysis.measure(runs, 0, _outcomes(right), _COSTS)
    assert point.madds == 420
    assert point.madds_error == 0
    # Both are means of the same 40 numbers.
    assert point.hull == pytest.approx(right[:, 2].mean(), abs=1e-15)
    assert point.gain == pytest.approx(0, abs=1e-15)


def _error(values) -> float:
  """Standard error of the mean, of the values as they are."""
  mean = math.fsum(values) / len(values)
  variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
  return math.sqrt(variance / len(values))


class CurveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    generator = np.random.default_rng(0)
    self.held_out, self.measured = (
      _outcomes(
        _random_right(500, seed),
        margins=generator.random((500, 3)),
        gate_logits=generator.normal(size=(500, 3)).astype(np.float32),
      )
      for seed in (1, 2)
    )

  @parameterized.parameters('gate', 'cascade')
  def test_leaves_out_budgets_out_of_range(self, kind):
    dial = (
      routing.GateDial(self.held_out, _COSTS)
      if kind == 'gate'
      else routing.CascadeDial(self.held_out, _COSTS)
    )
    low, high = dial.limits
    assert (low, high) == {'gate': (120, 400), 'cascade': (120, 420)}[kind]
    within = [low, low + 1, (low + high) / 2, high]
    budgets = [0, low - 1, *within, high + 1, 1e9]
    points = evaluation.curve(dial, budgets, self.measured, _COSTS)
    assert [point.budget for point in points] == within
    # Both ends are static buckets, of the images to measure on.
    assert points[0].madds == low
    assert points[0].top1 == self.measured.right[:, 0].mean()
    assert points[-1].madds == high
    assert points[-1].top1 == self.measured.right[:, 2].mean()

  def test_leaves_out_budgets_in_a_gap(self):
    alike = _outcomes(_random_right(500))
    dial = routing.GateDial(alike, _COSTS)
    points = evaluation.curve(dial, [120, 300, 400], self.measured, _COSTS)
    assert [point.budget for point in points] == [120, 400]

  def test_measures_each_router_on_the_other_images(self):
    dial = routing.GateDial(self.held_out, _COSTS)
    (point,) = evaluation.curve(dial, [250], self.measured, _COSTS)
    router = dial.router(250)
    utilities = self.measured.gate_logits + np.asarray(router.offsets)
    chosen = utilities.argmax(1)
    spent = np.array([120, 160, 400])[chosen]
    # Float64 means.
    assert point.madds == pytest.approx(spent.mean(), rel=1e-12)
    right = self.measured.right[np.arange(500), chosen]
    assert point.top1 == pytest.approx(right.mean(), rel=1e-12)
    assert point.gain_error == pytest.approx(
      _error(
        right - analysis.static_hull(spent.mean(), self.measured.right, _COSTS)
      ),
      rel=1e-9,
    )
