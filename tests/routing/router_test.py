"""Routers against each image run by hand, and scores against float64 NumPy."""

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
from ds_jax.routing import router as routers

_NUM_BUCKETS = 3
_WEIGHTS = (0.5, 2.0, -1.0)
_BIASES = (0.3, -0.2)


# One program instead of one for each of its steps.
_confidence_of = jax.jit(routers.confidence_of)
_learned_score = jax.jit(routers.LearnedScore.__call__)


def _scores_of(logits) -> dict[str, float]:
  """The scores of one image's logits, one class at a time."""
  logits = [float(x) for x in logits]
  label = logits.index(max(logits))
  others = [x - logits[label] for i, x in enumerate(logits) if i != label]
  # Of the label's probability: 1 / (1 + odds against it), whose logarithm
  # keeps its digits where the probability itself rounds to 1.
  against = math.fsum(math.exp(x) for x in others)
  log_label = -math.log1p(against)
  log_probabilities = [log_label, *(x + log_label for x in others)]
  scores = {
    'probability': -math.log(against),
    'margin': -max(others),
    'entropy': math.fsum(math.exp(x) * x for x in log_probabilities),
  }
  bias = _BIASES[label] if label < len(_BIASES) else 0.0
  learned = sum(w * s for w, s in zip(_WEIGHTS, scores.values(), strict=True))
  return {**scores, 'learned': learned + bias}


def _learned() -> routers.LearnedScore:
  return routers.LearnedScore(jnp.asarray(_WEIGHTS), jnp.asarray(_BIASES))


def _between(scores, share: float) -> float:
  """A threshold that about this share of the scores is below.

  In the middle of the widest gap nearby: the last bits of a score, which differ
  between one image and many, decide nothing.
  """
  scores = np.sort(np.asarray(scores, np.float64))
  near = int(share * len(scores))
  gaps = np.diff(scores)[near - 5 : near + 5]
  start = near - 5 + int(gaps.argmax())
  assert gaps.max() > 1e-4 * np.ptp(scores)
  return float(scores[start] + scores[start + 1]) / 2


class ConfidenceTest(parameterized.TestCase):
  @parameterized.product(num_classes=(2, 3, 10), scale=(0.1, 1.0, 10.0))
  def test_scores_equal_their_definitions_in_float64(self, num_classes, scale):
    generator = np.random.default_rng(num_classes)
    logits = generator.normal(0, scale, (40, num_classes)).astype(np.float32)
    confidence = _confidence_of(jnp.asarray(logits))
    hand = [list(_scores_of(x).values())[:3] for x in logits]
    # Float32's rounding of a logit of up to 40 is 2e-6 of its exponential.
    np.testing.assert_allclose(confidence.scores, hand, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(confidence.labels, logits.argmax(1))

  def test_axes_before_the_classes_are_kept(self):
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    confidence = _confidence_of(jnp.asarray(logits))
    assert confidence.scores.shape == (4, 3, 3)
    for i in range(4):
      for k in range(3):
        hand = list(_scores_of(logits[i, k]).values())[:3]
        # Float32 sums of five terms.
        np.testing.assert_allclose(
          confidence.scores[i, k], hand, rtol=1e-5, atol=1e-6
        )
        assert confidence.labels[i, k] == logits[i, k].argmax()

  def test_very_sure_answers_are_finite_and_told_apart(self):
    # A probability is 1 in float32 from a gap of 17 on.
    gaps = np.array([10, 20, 40, 40.001, 60, 80, 200], np.float32)
    logits = np.stack([gaps, 0 * gaps, 0 * gaps - 1], axis=1)
    scores = np.asarray(_confidence_of(jnp.asarray(logits)).scores)
    assert np.all(np.isfinite(scores))
    assert np.all(np.diff(scores, axis=0) > 0)
    hand = [list(_scores_of(x).values())[:3] for x in logits]
    # Relative, so that the entropy of 1e-33 counts; exp(-200) is no float32.
    np.testing.assert_allclose(scores, hand, rtol=2e-5, atol=1e-37)

  def test_two_equal_largest_logits_are_not_sure_at_all(self):
    logits = jnp.asarray([[3.0, -90.0, 3.0], [3.0, 3.0, -90.0]])
    confidence = _confidence_of(logits)
    expected = [[0.0, 0.0, -math.log(2)]] * 2
    # The third class has a probability of 1e-40.
    np.testing.assert_allclose(confidence.scores, expected, atol=1e-7)
    np.testing.assert_array_equal(confidence.labels, [0, 0])


class LearnedScoreTest(parameterized.TestCase):
  def test_equals_the_sum_by_hand_and_other_classes_have_no_bias(self):
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(30, 5)).astype(np.float32)
    confidence = _confidence_of(jnp.asarray(logits))
    assert set(np.asarray(confidence.labels)) == set(range(5))
    hand = [_scores_of(x)['learned'] for x in logits]
    # Three float32 products of scores of up to 4.
    np.testing.assert_allclose(
      _learned_score(_learned(), confidence), hand, rtol=1e-5, atol=2e-6
    )

  def test_takes_one_image_and_many_buckets_alike(self):
    logits = np.random.default_rng(2).normal(size=(4, 3, 5)).astype(np.float32)
    scores, one = (
      _learned_score(_learned(), _confidence_of(jnp.asarray(x)))
      for x in (logits, logits[2, 1])
    )
    assert scores.shape == (4, 3)
    # The same sum, maybe in another order.
    np.testing.assert_allclose(one, scores[2, 1], rtol=1e-6, atol=1e-7)


def _by_hand(router, rules, logits_of, num_images):
  """Runs images one at a time.

  Args:
    router: whose number of runs the result has.
    rules: `first`, the bucket of each image, or else the first of the `ladder`;
      and `thresholds` on the `score`, for each rung that follows.
    logits_of: logits of (image, bucket), called for what runs alone.
    num_images: N.

  Returns:
    Runs (N, R) and logits (N, C).
  """
  num_runs = len(router.runs)
  runs = np.full((num_images, num_runs), _NUM_BUCKETS)
  last_logits = []
  for i in range(num_images):
    todo = list(rules['ladder'])
    bucket = rules['first'][i] if 'first' in rules else todo.pop(0)
    logits = logits_of(i, bucket)
    runs[i, 0] = bucket
    for run, (rung, threshold) in enumerate(
      zip(todo, rules['thresholds'], strict=True), start=1
    ):
      sure = _scores_of(logits)[rules['score']] >= threshold
      if sure or rung <= bucket:
        break
      bucket, logits = rung, logits_of(i, rung)
      runs[i, run] = rung
    last_logits.append(logits)
  return runs, np.stack(last_logits)


def _gate_choice(gate_logits, offsets, utility):
  """The first bucket of each image, in float64."""
  chosen = []
  for row in np.asarray(gate_logits, np.float64):
    utilities = [
      1 / (1 + math.exp(-x)) if utility == 'probability' else x for x in row
    ]
    sums = [u + o for u, o in zip(utilities, offsets, strict=True)]
    chosen.append(sums.index(max(sums)))
  return chosen


class RouteTest(parameterized.TestCase):
  """With the branches of a model."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model = ds_jax.create_model(**micro.MODEL)
    # Untrained logits are all but equal.
    model.classifier.kernel[...] *= 1e4
    branches = [
      functools.partial(model.branch, subnet=s) for s in model.routing_space
    ]
    generator = np.random.default_rng(0)
    images = generator.normal(size=(64, 8, 8, 3))
    cls.features = np.asarray(model.trunk(jnp.asarray(images, jnp.float32)))
    cls.gate_logits = generator.normal(size=(64, 3)).astype(np.float32)
    run_all = jax.jit(lambda x: jnp.stack([b(x) for b in branches], 1))
    cls.logits = np.concatenate(
      [run_all(cls.features[i : i + 1]) for i in range(64)]
    )
    route = jax.jit(lambda r, g, x: routed.route(r, branches, g, x))
    # Not a class attribute as it is: that would bind `self`.
    cls.programs = {'route': route}

  def router_and_rules(self, kind):
    if kind.startswith('gate'):
      utility, offsets = kind.split()[1], (0.4, 0.1, -0.2)
      first = _gate_choice(self.gate_logits, offsets, utility)
      return (
        routing.gate_router(offsets, utility),
        {'first': first, 'ladder': (), 'thresholds': ()},
      )
    _, score, *ladder = kind.split()
    ladder = [int(rung) for rung in ladder]
    thresholds = [
      _between([_scores_of(x[rung])[score] for x in self.logits], 0.6)
      for rung in ladder[:-1]
    ]
    learned = _learned() if score == 'learned' else None
    return (
      routing.cascade_router(3, ladder, thresholds, score, learned),
      {'ladder': ladder, 'thresholds': thresholds, 'score': score},
    )

  @parameterized.product(
    batch_size=(1, 7, 64),
    kind=('gate logits', 'cascade margin 0 2', 'cascade learned 0 1 2'),
  )
  def test_a_batch_equals_each_image_by_hand(self, batch_size, kind):
    router, rules = self.router_and_rules(kind)
    found = self.programs['route'](
      router, self.gate_logits[:batch_size], self.features[:batch_size]
    )
    runs, logits = _by_hand(
      router, rules, lambda i, k: self.logits[i, k], batch_size
    )
    np.testing.assert_array_equal(found.runs, runs)
    # A convolution over 4 images adds up in another order than over 1.
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-6)
    if batch_size == 64:
      # Every place to stop, or every bucket, is some image's.
      ways = np.unique(runs, axis=0)
      assert len(ways) == {'gate logits': 3}.get(kind, len(router.runs))

  @parameterized.parameters(
    'gate logits', 'cascade margin 0 2', 'cascade learned 0 1 2'
  )
  def test_a_replay_of_the_outcomes_runs_the_same(self, kind):
    router, _ = self.router_and_rules(kind)
    outcomes = jax.jit(routing.observe)(
      self.gate_logits, self.logits, np.zeros(64, np.int32)
    )
    runs = routing.replay(router, jax.tree.map(np.asarray, outcomes))
    found = self.programs['route'](router, self.gate_logits, self.features)
    np.testing.assert_array_equal(runs, found.runs)


class RulesTest(parameterized.TestCase):
  """With branches of one product, and more kinds of routers."""

  def setUp(self):
    super().setUp()
    generator = np.random.default_rng(3)
    self.features = jnp.asarray(generator.normal(size=(50, 4)), jnp.float32)
    self.gate_logits = generator.normal(size=(50, 3)).astype(np.float32)
    self.scales = generator.normal(0, 2, (3, 1, 4)).astype(np.float32)

  def branches(self):
    return tuple(lambda x, k=k: x * self.scales[k] for k in range(3))

  def logits_of(self, i, bucket):
    return np.asarray(self.features)[i] * self.scales[bucket, 0]

  def check(self, router, rules, num_ways):
    runs, logits = _by_hand(router, rules, self.logits_of, 50)
    assert len(np.unique(runs, axis=0)) == num_ways
    found = jax.jit(routed.route, static_argnames='branches')(
      router, self.branches(), self.gate_logits, self.features
    )
    np.testing.assert_array_equal(found.runs, runs)
    # One product, the same everywhere.
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(
      routing.last_bucket(found.runs, 3),
      [[k for k in row if k < 3][-1] for row in runs],
    )

  def thresholds(self, score, rungs, share):
    return [
      _between(
        [_scores_of(self.logits_of(i, k))[score] for i in range(50)], share
      )
      for k in rungs
    ]

  @parameterized.parameters(*routing.SCORES)
  def test_a_cascade_goes_on_by_its_own_score(self, score):
    thresholds = self.thresholds(score, (0, 1), 0.5)
    learned = _learned() if score == 'learned' else None
    self.check(
      routing.cascade_router(3, (0, 1, 2), thresholds, score, learned),
      {'ladder': (0, 1, 2), 'thresholds': thresholds, 'score': score},
      num_ways=3,
    )

  def test_who_stopped_stays_so_whatever_later_thresholds_say(self):
    (first,) = self.thresholds('margin', (0,), 0.5)
    # All answers are below the second threshold.
    self.check(
      routing.cascade_router(3, (0, 1, 2), (first, np.inf)),
      {
        'ladder': (0, 1, 2),
        'thresholds': (first, math.inf),
        'score': 'margin',
      },
      num_ways=2,
    )

  @parameterized.parameters(0, 1, 2)
  def test_a_ladder_of_one_rung_is_a_static_bucket(self, bucket):
    router = routing.cascade_router(3, (bucket,), ())
    assert not router.uses_gate
    self.check(router, {'ladder': (bucket,), 'thresholds': ()}, num_ways=1)

  @parameterized.parameters(
    ('logits', (0.0, 0.0, 0.0)),
    ('logits', (1.0, -1.0, 0.5)),
    ('probability', (0.0, 0.0, 0.0)),
    ('probability', (0.1, -0.05, 0.0)),
  )
  def test_a_gate_picks_the_largest_utility_with_its_offset(
    self, utility, offsets
  ):
    router = routing.gate_router(offsets, utility)
    assert router.uses_gate
    first = _gate_choice(self.gate_logits, offsets, utility)
    self.check(
      router, {'first': first, 'ladder': (), 'thresholds': ()}, num_ways=3
    )

  def test_utilities_make_a_difference(self):
    offsets = (0.1, -0.05, 0.0)
    chosen = [
      _gate_choice(self.gate_logits, offsets, utility)
      for utility in ('logits', 'probability')
    ]
    assert chosen[0] != chosen[1]

  def test_after_the_gate_an_image_goes_on_to_larger_buckets_alone(self):
    offsets, (threshold,) = (0.0,) * 3, self.thresholds('margin', (1,), 0.6)
    router = routers.Router(
      jnp.asarray(offsets), jnp.asarray([threshold]), runs=((0, 1, 2), (2,))
    )
    first = _gate_choice(self.gate_logits, offsets, 'logits')
    # 0, 1 and 2 that stop, and 0 and 1 that go on.
    self.check(
      router,
      {
        'first': first,
        'ladder': (2,),
        'thresholds': (threshold,),
        'score': 'margin',
      },
      num_ways=5,
    )

  def test_a_bucket_that_no_image_needs_does_not_run(self):
    ran = []

    def make_branch(bucket, branch):
      def counted(x):
        jax.debug.callback(lambda _: ran.append(bucket), x[0, 0])
        return branch(x)

      return counted

    branches = tuple(make_branch(k, b) for k, b in enumerate(self.branches()))
    route = jax.jit(routed.route, static_argnames='branches')
    for end, expected in ((-np.inf, {0}), (np.inf, {0, 2})):
      ran.clear()
      route(
        routing.cascade_router(3, (0, 2), (end,)),
        branches,
        self.gate_logits,
        self.features,
      )
      jax.effects_barrier()
      assert set(ran) == expected


def test_another_budget_compiles_nothing_anew():
  generator = np.random.default_rng(0)
  gate_logits = jnp.asarray(generator.normal(size=(8, 3)), jnp.float32)
  features = jnp.asarray(generator.normal(size=(8, 4)), jnp.float32)
  traces = []

  @jax.jit
  def run(router, gate_logits, features):
    traces.append(router.runs)
    branches = [lambda x, k=k: x * (k + 1) for k in range(3)]
    return routed.route(router, branches, gate_logits, features).runs

  kinds = [
    [routing.gate_router(o) for o in ((0, 0, 0), (0.5, 0, -0.5), [9, 0, 0])],
    [routing.cascade_router(3, (0, 2), (t,)) for t in (-np.inf, 0.3, 9)],
    [
      routing.cascade_router(
        3, (0, 2), (t,), 'learned', routers.LearnedScore(jnp.ones(3), b)
      )
      for t, b in ((-9.0, jnp.zeros(4)), (9.0, jnp.ones(4)))
    ],
  ]
  for number, kind in enumerate(kinds, start=1):
    runs = [np.asarray(run(r, gate_logits, features)) for r in kind]
    assert len(traces) == number
    # They are other routers, though.
    assert not np.array_equal(runs[0], runs[1])


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    ([2, 0],), ([0, 0],), ([0, 3],), ([-1, 1],), ([1, 2, 1],), ([],)
  )
  def test_ladders_that_do_not_rise_through_the_buckets(self, ladder):
    with pytest.raises(ValueError, match='expected one or more.*0 to 2, risi'):
      routing.cascade_router(3, ladder, [0.0] * (len(ladder) - 1))

  def test_unknown_scores(self):
    with pytest.raises(ValueError, match="score='sureness'.*'probability' or"):
      routing.cascade_router(3, (0, 2), (0.0,), 'sureness')

  def test_unknown_utilities(self):
    with pytest.raises(ValueError, match="utility='odds'.*'logits' or 'prob"):
      routing.gate_router((0.0, 0.0), 'odds')
