"""Dials: what their routers spend on images that they were not set on.

Axes: N images, K buckets, C classes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import ds_jax
import micro
import routed
from ds_jax import routing
from ds_jax.routing import budget
from ds_jax.routing import router as routers

_COSTS = routing.BucketCosts(100, np.array([100, 300, 900]))
_FRACTIONS = (0.03, 0.25, 0.5, 0.75, 0.97)

# Name, and what makes the dial of outcomes and costs.
_DIALS = {
  'gate, logits': functools.partial(routing.GateDial, utility='logits'),
  'gate, probability': functools.partial(
    routing.GateDial, utility='probability'
  ),
  **{
    f'cascade, {score}': functools.partial(routing.CascadeDial, score=score)
    for score in routing.SCORES
  },
  **{
    f'ladder, {score}': functools.partial(
      routing.CascadeDial, ladder=(0, 1, 2), score=score
    )
    for score in ('margin', 'learned')
  },
}

_observe = jax.jit(routing.observe)


@functools.cache
def _trained_looking(num_images: int, seed: int) -> routing.Outcomes:
  """Outcomes of a network that is surer, and righter, the easier an image is.

  Dearer buckets are better, classes differ in difficulty, and the gate sees the
  difficulty through noise.
  """
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, 10, num_images)
  ease = generator.normal(2.5, 2, num_images) + 0.2 * labels
  logits = generator.normal(size=(num_images, 1, 10))
  logits = logits + 0.7 * generator.normal(size=(num_images, 3, 10))
  strength = ease[:, None] + np.array([0.0, 0.7, 1.5])
  logits[np.arange(num_images), :, labels] += strength
  seen = ease + generator.normal(0, 1, num_images)
  gate_logits = seen[:, None] * np.array([1.0, 0.8, 0.5]) + np.array(
    [0, 0.6, 2]
  )
  gate_logits += generator.normal(0, 0.2, gate_logits.shape) - 2
  outcomes = _observe(
    gate_logits.astype(np.float32),
    logits.astype(np.float32),
    labels.astype(np.int32),
  )
  return jax.tree.map(np.asarray, outcomes)


def _part(outcomes: routing.Outcomes, images: slice) -> routing.Outcomes:
  return jax.tree.map(lambda x: x[images], outcomes)


def _spent(router, outcomes, costs) -> np.ndarray:
  """MAdds of each image, branch by branch."""
  spent = np.full(len(outcomes), costs.trunk)
  for run in routing.replay(router, outcomes).T:
    for bucket, madds in enumerate(costs.branches):
      spent[run == bucket] += madds
  return spent


def _check_budgets(dial, measured, costs):
  low, high = dial.limits
  for fraction in _FRACTIONS:
    madds = low + fraction * (high - low)
    spent = _spent(dial.router(madds), measured, costs)
    error = spent.std() / math.sqrt(len(spent))
    # What was promised: 2%, and two standard errors of the mean.
    assert abs(spent.mean() - madds) <= 0.02 * madds + 2 * error, fraction


class HeldOutBudgetTest(parameterized.TestCase):
  @parameterized.product(name=tuple(_DIALS), seed=(0, 1))
  def test_is_kept_on_other_images(self, name, seed):
    both = _trained_looking(8000, seed)
    dial = _DIALS[name](_part(both, slice(4000)), _COSTS)
    _check_budgets(dial, _part(both, slice(4000, 8000)), _COSTS)

  @parameterized.parameters(*_DIALS)
  def test_is_missed_by_chance_alone(self, name):
    misses = []
    for seed in range(8):
      both = _trained_looking(1200, seed)
      dial = _DIALS[name](_part(both, slice(600)), _COSTS)
      measured = _part(both, slice(600, 1200))
      for fraction in (0.2, 0.8):
        madds = dial.limits[0] + fraction * np.ptp(dial.limits)
        spent = _spent(dial.router(madds), measured, _COSTS)
        # Both samples are of 600.
        error = spent.std() * math.sqrt(2 / 600)
        misses.append((spent.mean() - madds) / error)
    # Of 16 numbers of standard deviation 1; two budgets of one seed are not
    # independent, which leaves as little as 8.
    assert abs(np.mean(misses)) < 3 / math.sqrt(8)
    assert np.sqrt(np.mean(np.square(misses))) < 2

  @parameterized.parameters(*_DIALS)
  def test_is_met_to_one_image_on_the_dials_own(self, name):
    outcomes = _trained_looking(600, 5)
    dial = _DIALS[name](outcomes, _COSTS)
    low, high = dial.limits
    for fraction in _FRACTIONS:
      madds = low + fraction * (high - low)
      router = dial.router(madds)
      spent = _spent(router, outcomes, _COSTS).mean()
      # The search ends at a ten-thousandth.
      assert abs(spent - madds) <= max((high - low) / 600, 1e-4 * madds)
      assert budget.mean_madds(router, outcomes, _COSTS) == spent

  @parameterized.parameters(*_DIALS)
  def test_no_image_is_on_the_edge(self, name):
    outcomes = _trained_looking(300, seed=0)
    dial = _DIALS[name](outcomes, _COSTS)
    low, high = dial.limits
    for fraction in (0.3, 0.6):
      router = dial.router(low + fraction * (high - low))
      spent = _spent(router, outcomes, _COSTS)
      for factor in (1 - 1e-5, 1 + 1e-5):
        # As of logits that another machine has rounded.
        moved = jax.tree.map(
          lambda x, factor=factor: (
            x * np.float32(factor) if x.dtype == np.float32 else x
          ),
          outcomes,
        )
        np.testing.assert_array_equal(_spent(router, moved, _COSTS), spent)

  def test_more_budget_runs_no_image_for_less(self):
    outcomes = _trained_looking(600, 6)
    dial = routing.CascadeDial(outcomes, _COSTS, (0, 1, 2))
    low, high = dial.limits
    spent = [
      _spent(dial.router(low + f * (high - low)), outcomes, _COSTS)
      for f in (0, *_FRACTIONS, 1)
    ]
    assert np.all(np.diff(spent, axis=0) >= 0)

  def test_the_rungs_stop_at_one_probability_of_being_right(self):
    outcomes = _trained_looking(4000, 7)
    dial = routing.CascadeDial(outcomes, _COSTS, (0, 1, 2))
    router = dial.router(700)
    runs = routing.replay(router, outcomes)
    # Thresholds between two scores each: at the threshold, log odds are equal.
    log_odds = []
    for run, threshold in enumerate(np.asarray(router.thresholds)):
      margins = outcomes.confidence_at(run).scores[:, 1].astype(np.float64)
      log_odds.append(_logistic(margins, outcomes.right[:, run], threshold))
    # The regularised fit and this plain one differ by some thousandths.
    assert log_odds[0] == pytest.approx(log_odds[1], abs=0.03)
    assert {tuple(row) for row in runs} == {(0, 3, 3), (0, 1, 3), (0, 1, 2)}


def _logistic(x, y, at) -> float:
  """Log odds at a point of the logistic regression of y on x, by Newton."""
  inputs = np.stack([np.ones_like(x), x], axis=1)
  weights = np.zeros(2)
  for _ in range(30):
    p = 1 / (1 + np.exp(-inputs @ weights))
    hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs
    weights += np.linalg.solve(hessian, inputs.T @ (y - p))
  return float(weights @ [1, at])


class ModelBudgetTest(parameterized.TestCase):
  """With the logits of a model, of images and labels at random."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model = ds_jax.create_model(
      **micro.MODEL, gate_head='own', gate_pooling='mean_max_std'
    )
    generator = np.random.default_rng(0)
    # Untrained, it would say the same of every image.
    head = generator.normal(size=model.slim.head.kernel.shape)
    model.slim.head.kernel[...] = jnp.asarray(head, jnp.float32)
    model.classifier.kernel[...] *= 1e4

    @jax.jit
    def observe(images, uniform):
      features = model.trunk(images)
      logits = [model.branch(features, s) for s in model.routing_space]
      # The widest is right as often as it says.
      shares = jax.nn.softmax(logits[-1]).cumsum(-1)
      labels = (shares < uniform).sum(-1).clip(0, 2)
      return routing.observe(
        model.gate_logits(features), jnp.stack(logits, 1), labels
      )

    images = generator.normal(size=(8000, 8, 8, 3)).astype(np.float32)
    uniform = generator.random((8000, 1)).astype(np.float32)
    cls.outcomes = jax.tree.map(np.asarray, observe(images, uniform))
    cls.costs = routing.BucketCosts.of_model(model, 8)

  @parameterized.parameters(*_DIALS)
  def test_is_kept_on_other_images(self, name):
    dial = _DIALS[name](_part(self.outcomes, slice(4000)), self.costs)
    _check_budgets(dial, _part(self.outcomes, slice(4000, 8000)), self.costs)


class LimitsTest(parameterized.TestCase):
  @parameterized.parameters('logits', 'probability')
  def test_a_gates_ends_send_all_to_the_cheapest_and_the_largest(self, utility):
    outcomes, others = _trained_looking(600, 0), _trained_looking(600, 1)
    # Far from all that the dial was set on.
    others = others.replace(gate_logits=100 * others.gate_logits)
    dial = routing.GateDial(outcomes, _COSTS, utility)
    assert dial.limits == (200, 1000)
    for end, bucket in ((0, 0), (1, 2)):
      router = dial.router(dial.limits[end])
      runs = routing.replay(router, others)
      np.testing.assert_array_equal(runs, np.full((600, 1), bucket))
      np.testing.assert_array_equal(_COSTS.of_runs(runs), dial.limits[end])

  @parameterized.parameters(
    *((score, None) for score in routing.SCORES),
    *((score, (0, 1, 2)) for score in ('margin', 'learned')),
    ('margin', (0, 1)),
    ('margin', (1, 2)),
  )
  def test_a_cascades_ends_run_the_first_rung_and_all_of_them(
    self, score, ladder
  ):
    outcomes, others = _trained_looking(600, 0), _trained_looking(600, 1)
    dial = routing.CascadeDial(outcomes, _COSTS, ladder, score)
    expected = {
      None: (200, 1100),
      (0, 1, 2): (200, 1400),
      (1, 2): (400, 1300),
      (0, 1): (200, 500),
    }
    assert dial.limits == expected[ladder]
    rungs = ladder or (0, 2)
    first = (rungs[0], *[3] * (len(rungs) - 1))
    for madds, run in zip(dial.limits, (first, rungs), strict=True):
      runs = routing.replay(dial.router(madds), others)
      np.testing.assert_array_equal(runs, np.tile(run, (600, 1)))
      np.testing.assert_array_equal(_COSTS.of_runs(runs), madds)

  @parameterized.parameters('margin', 'learned')
  def test_a_ladder_of_one_rung_has_one_budget(self, score):
    outcomes = _trained_looking(600, 0)
    dial = routing.CascadeDial(outcomes, _COSTS, (1,), score)
    assert dial.limits == (400, 400)
    runs = routing.replay(dial.router(400), outcomes)
    np.testing.assert_array_equal(runs, np.full((600, 1), 1))


class RefusedTest(parameterized.TestCase):
  @parameterized.product(
    name=('gate, logits', 'cascade, margin', 'ladder, margin'),
    end=(0, 1),
  )
  def test_budgets_out_of_range_name_it(self, name, end):
    costs = routing.BucketCosts(1000, np.array([1000, 3000, 9000]))
    dial = _DIALS[name](_trained_looking(600, 0), costs)
    high = {'gate': '10,000', 'cascade': '11,000', 'ladder': '14,000'}
    with pytest.raises(
      routing.BudgetError,
      match=f'spends 2,000 to {high[name.split(",")[0]]}[.]',
    ):
      dial.router(dial.limits[end] + (-1, 1)[end])

  def test_check_budget_takes_the_ends_and_no_other_number(self):
    for madds in (200, 200.5, 1000):
      routing.check_budget(madds, (200, 1000))
    for madds in (199.999, 1000.001, -math.inf, math.inf, math.nan):
      with pytest.raises(routing.BudgetError, match='200 to 1,000'):
        routing.check_budget(madds, (200, 1000))

  @parameterized.parameters('logits', 'probability')
  def test_a_gate_that_says_the_same_of_all_images_leaves_gaps(self, utility):
    outcomes = _trained_looking(600, 0)
    alike = outcomes.replace(
      gate_logits=np.tile(np.float32([0.1, 0.5, 0.7]), (600, 1))
    )
    dial = routing.GateDial(alike, _COSTS, utility)
    for madds in (300, 700):
      with pytest.raises(routing.BudgetError, match=f'{madds} .* a gap: '):
        dial.router(madds)
    for madds in (200, 400, 1000):
      # Bought by the price alone.
      router = dial.router(madds)
      assert set(_spent(router, alike, _COSTS)) == {madds}

  def test_scores_that_are_the_same_of_all_images_leave_a_gap(self):
    outcomes = _trained_looking(600, 0)
    scores = np.tile(np.float32([1.1, 2.2, -0.3]), (600, 3, 1))
    alike = outcomes.replace(
      confidence=routers.Confidence(scores, outcomes.confidence.labels)
    )
    for score in ('probability', 'margin', 'entropy'):
      dial = routing.CascadeDial(alike, _COSTS, score=score)
      with pytest.raises(routing.BudgetError, match='700 .* a gap: '):
        dial.router(700)

  @parameterized.product(
    score=('margin', 'learned'), ladder=((2, 0), (0, 0, 2), (0, 3), (3, 4), ())
  )
  def test_ladders_that_do_not_rise_through_the_buckets(self, score, ladder):
    with pytest.raises(ValueError, match='expected one or more.*0 to 2, risi'):
      routing.CascadeDial(_trained_looking(600, 0), _COSTS, ladder, score)

  def test_unknown_scores(self):
    with pytest.raises(ValueError, match="score='sureness'.*'probability' or"):
      routing.CascadeDial(_trained_looking(600, 0), _COSTS, score='sureness')

  @parameterized.parameters(200, 600)
  def test_unknown_utilities(self, madds):
    with pytest.raises(ValueError, match="utility='odds'.*'logits' or 'prob"):
      routing.GateDial(_trained_looking(600, 0), _COSTS, 'odds').router(madds)


@pytest.mark.parametrize('name', _DIALS)
def test_another_budget_compiles_nothing_anew(name):
  outcomes = _trained_looking(600, 0)
  dial = _DIALS[name](outcomes, _COSTS)
  traces = []

  @jax.jit
  def run(router, gate_logits, features):
    traces.append(router.runs)
    branches = [lambda x, k=k: x * (k + 1) for k in range(3)]
    return routed.route(router, branches, gate_logits, features).runs

  low, high = dial.limits
  runs = [
    np.asarray(
      run(dial.router(madds), outcomes.gate_logits[:8], jnp.eye(8) * 3)
    )
    for madds in (low, (low + high) / 2, low + 0.6 * (high - low), high)
  ]
  assert len(traces) == 1
  # They are other routers, though.
  assert not np.array_equal(runs[0], runs[-1])


class GateAtTargetTest(parameterized.TestCase):
  @parameterized.parameters(
    ('sandwich', 'logits'), ('correctness', 'probability')
  )
  def test_spends_the_target_on_held_out_images(self, target, utility):
    outcomes = _trained_looking(600, 0)
    router = routing.gate_at_target(
      outcomes, _COSTS, routing.GateTarget(target, 600.0)
    )
    assert router.utility == utility
    # One image more or less.
    spent = _spent(router, outcomes, _COSTS).mean()
    assert spent == pytest.approx(600, abs=1.4)

  @parameterized.parameters((True, None), (False, 600.0), (False, None))
  def test_is_the_gate_as_trained_without_images_or_target(self, held, madds):
    outcomes = _trained_looking(600, 0)
    router = routing.gate_at_target(
      outcomes if held else None, _COSTS, routing.GateTarget('sandwich', madds)
    )
    runs = routing.replay(router, outcomes)
    np.testing.assert_array_equal(runs[:, 0], outcomes.gate_logits.argmax(1))
    assert len(np.unique(runs)) == 3


class LearnedScoreTest(parameterized.TestCase):
  def outcomes(self, shares, seed=0):
    """Answers of class c are right that often; scores are noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(shares), (3000, 2))
    scores = generator.normal(size=(3000, 2, 3)).astype(np.float32)
    right = generator.random((3000, 2)) < np.array(shares)[labels]
    return routing.Outcomes(
      np.zeros((3000, 2), np.float32),
      routers.Confidence(scores, labels.astype(np.int32)),
      right,
    )

  def test_learns_the_class_where_the_class_alone_matters(self):
    shares = (0.9, 0.3, 0.6)
    outcomes = self.outcomes(shares)
    learned = budget.fit_learned_score(outcomes, (0,))
    confidence = outcomes.confidence_at(0)
    observed = [
      outcomes.right[confidence.labels == c, 0].mean() for c in range(3)
    ]
    expected = [math.log(p / (1 - p)) for p in observed]
    # A ridge of 1 on 1000 images a class takes about a hundredth off.
    np.testing.assert_allclose(
      np.diff(learned.biases), np.diff(expected), atol=0.08
    )
    # By chance, 1 / sqrt(3000 * 0.2) of each noise score.
    np.testing.assert_allclose(learned.weights, 0, atol=0.16)
    # Any answer of a better class is surer than most of a worse.
    scores = np.asarray(learned(confidence))
    means = [scores[confidence.labels == c].mean() for c in range(3)]
    assert means[0] > means[2] + 1 > means[1] + 1.5

  def test_equals_a_regression_by_newton(self):
    outcomes = _trained_looking(1500, 3)
    learned = budget.fit_learned_score(outcomes, (0, 1))
    scores = outcomes.confidence.scores[:, :2].transpose(1, 0, 2)
    scores = scores.reshape(-1, 3).astype(np.float64)
    labels = outcomes.confidence.labels[:, :2].T.reshape(-1)
    right = outcomes.right[:, :2].T.reshape(-1)
    scale = scores.std(0)
    inputs = np.concatenate([scores / scale, np.eye(10)[labels]], axis=1)
    inputs = np.concatenate([inputs, np.ones((3000, 1))], axis=1)
    # The ridge is of all but the constant.
    ridge = np.diag([1.0] * 13 + [0.0])
    weights = np.zeros(14)
    for _ in range(50):
      p = 1 / (1 + np.exp(-inputs @ weights))
      hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs + ridge
      gradient = inputs.T @ (right - p) - ridge @ weights
      weights += np.linalg.solve(hessian, gradient)
    expected = inputs @ weights
    fitted = np.asarray(
      learned(jax.tree.map(lambda x: x[:, :2], outcomes.confidence))
    )
    # Up to a constant, which moves the thresholds alone. The other solver stops
    # a little early, with scores that correlate.
    difference = fitted.T.reshape(-1) - expected
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(difference, difference.mean(), atol=0.05)

  @parameterized.parameters(True, False)
  def test_is_the_scores_where_all_answers_are_alike(self, right):
    outcomes = self.outcomes((0.5, 0.5)).replace(
      right=np.full((3000, 2), right)
    )
    learned = budget.fit_learned_score(outcomes, (0, 1))
    np.testing.assert_array_equal(learned.biases, 0)
    assert np.all(np.asarray(learned.weights) > 0)
    # And a dial can be made of it.
    costs = routing.BucketCosts(100, np.array([100, 900]))
    dial = routing.CascadeDial(outcomes, costs, score='learned')
    spent = _spent(dial.router(500), outcomes, costs).mean()
    # One image more or less.
    assert spent == pytest.approx(500, abs=0.31)
