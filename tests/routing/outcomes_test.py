"""Outcomes, their replay and their costs, against loops over the images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import serialization

import ds_jax
import micro
import routed
from ds_jax import models, routing
from ds_jax.routing import router as routers


def _random(num_images=60, num_buckets=3, num_classes=4, seed=0):
  """Gate logits, logits (N, K, C) and labels."""
  generator = np.random.default_rng(seed)
  shape = (num_images, num_buckets)
  return (
    generator.normal(size=shape).astype(np.float32),
    generator.normal(0, 2, (*shape, num_classes)).astype(np.float32),
    generator.integers(0, num_classes, num_images).astype(np.int32),
  )


def _observe(gate_logits, logits, labels) -> routing.Outcomes:
  return jax.tree.map(
    np.asarray, jax.jit(routing.observe)(gate_logits, logits, labels)
  )


class ObserveTest(parameterized.TestCase):
  def test_right_is_whether_the_largest_logit_is_the_labels(self):
    gate_logits, logits, labels = _random()
    outcomes = _observe(gate_logits, logits, labels)
    hand = [
      [list(x).index(max(x)) == label for x in row]
      for row, label in zip(logits, labels, strict=True)
    ]
    np.testing.assert_array_equal(outcomes.right, hand)
    np.testing.assert_array_equal(outcomes.gate_logits, gate_logits)
    assert len(outcomes) == len(labels)

  def test_confidence_at_is_of_that_buckets_answers(self):
    outcomes = _observe(*_random())
    _, logits, _ = _random()
    for bucket in range(3):
      confidence = outcomes.confidence_at(bucket)
      np.testing.assert_array_equal(
        confidence.labels, logits[:, bucket].argmax(-1)
      )
      ordered = np.sort(logits[:, bucket].astype(np.float64), axis=-1)
      # A float32 difference of logits of up to 8.
      np.testing.assert_allclose(
        confidence.scores[:, routers.SCORES.index('margin')],
        ordered[:, -1] - ordered[:, -2],
        atol=1e-6,
      )


class ImagesHeldOutTest(parameterized.TestCase):
  def test_are_those_of_the_mask_in_format_1(self):
    outcomes = _observe(*_random())
    mask = np.arange(60) % 3 != 1
    restored = routing.images_held_out(
      {'outcomes': serialization.to_state_dict(outcomes), 'mask': mask}
    )
    expected = jax.tree.map(lambda x: x[mask], outcomes)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert len(restored) == 40

  def test_are_none_where_a_checkpoint_has_none(self):
    state = serialization.to_state_dict(_observe(*_random()))
    none = {'outcomes': state, 'mask': np.zeros(60, bool)}
    assert routing.images_held_out(none) is None
    assert routing.images_held_out({'network': {}}) is None


def _learned() -> routers.LearnedScore:
  return routers.LearnedScore(
    jnp.asarray([0.5, 2.0, -1.0]), jnp.asarray([0.3, -0.2, 1.0])
  )


class ReplayTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: routing.gate_router((0.3, 0.0, -0.2)), 3),
    (lambda: routing.gate_router((0.05, 0.0, -0.05), 'probability'), 3),
    (lambda: routing.cascade_router(3, (0, 2), (1.2,), 'probability'), 2),
    (lambda: routing.cascade_router(3, (0, 2), (1.5,), 'margin'), 2),
    (lambda: routing.cascade_router(3, (1, 2), (-0.6,), 'entropy'), 2),
    (lambda: routing.cascade_router(3, (0, 1, 2), (1.5, 2.0), 'margin'), 3),
    (
      lambda: routing.cascade_router(
        3, (0, 1, 2), (4.0, 4.0), 'learned', _learned()
      ),
      3,
    ),
    (lambda: routing.cascade_router(3, (1,), ()), 1),
    (
      lambda: routers.Router(
        jnp.zeros(3), jnp.asarray([1.5]), runs=((0, 1, 2), (2,))
      ),
      5,
    ),
  )
  def test_runs_and_answers_as_the_device_does(self, make, num_ways):
    router = make()
    gate_logits, logits, labels = _random(60)
    outcomes = _observe(gate_logits, logits, labels)
    runs = routing.replay(router, outcomes)
    # Branches that give the logits as they are.
    branches = [lambda x, k=k: x[:, k] for k in range(3)]
    found = jax.jit(lambda r, g, x: routed.route(r, branches, g, x))(
      router, gate_logits, logits
    )
    np.testing.assert_array_equal(runs, found.runs)
    assert len(np.unique(runs, axis=0)) == num_ways
    last = [[k for k in row if k < 3][-1] for row in runs]
    np.testing.assert_array_equal(found.logits, logits[range(60), last])
    right = routing.right_answers(runs, outcomes)
    np.testing.assert_array_equal(right, found.logits.argmax(-1) == labels)
    assert 0 < right.sum() < 60


def _multiply_adds(function, x) -> int:
  """Of the convolutions, products and average pools that a program is of."""
  return _of_equations(jax.make_jaxpr(function)(x).jaxpr)


def _of_equations(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        total += _of_equations(value.jaxpr)
    # A depthwise convolution's program depends on the machine; one of them has
    # the convolution, the other the same sums in pieces.
    branches = equation.params.get('branches', ())
    total += max((_of_equations(b.jaxpr) for b in branches), default=0)
    shapes = [v.aval.shape for v in equation.invars]
    (result,) = (v.aval.size for v in equation.outvars)
    if equation.primitive.name == 'conv_general_dilated':
      # Axes of a kernel: (height, width, inputs of a group, outputs).
      total += result * math.prod(shapes[1][:3])
    elif equation.primitive.name == 'dot_general':
      ((axes, _), _) = equation.params['dimension_numbers']
      total += result * math.prod(shapes[0][axis] for axis in axes)
    elif equation.primitive.name == 'reduce_sum' and len(shapes[0]) == 4:
      total += math.prod(shapes[0])
  return total


class BucketCostsTest(parameterized.TestCase):
  def test_of_runs_is_the_trunk_once_and_each_branch_that_ran_once(self):
    costs = routing.BucketCosts(1000, np.array([10, 200, 3000]))
    runs = np.array([[0, 3, 3], [0, 1, 3], [0, 1, 2], [1, 3, 3], [2, 3, 3]])
    np.testing.assert_array_equal(
      costs.of_runs(runs), [1010, 1210, 4210, 1200, 4000]
    )
    np.testing.assert_array_equal(
      costs.of_runs(runs[:, :1]), costs.buckets[runs[:, 0]]
    )
    np.testing.assert_array_equal(costs.buckets, [1010, 1200, 4000])

  def test_of_runs_is_exact_past_the_int32s(self):
    costs = routing.BucketCosts(4_000_000_001, np.array([1, 6_000_000_007]))
    runs = np.array([[0, 1], [0, 2]], np.int32)
    assert costs.of_runs(runs).tolist() == [10_000_000_009, 4_000_000_002]

  @parameterized.parameters(8, 9, 32)
  def test_of_model_adds_up_to_the_cost_of_each_bucket(self, image_size):
    model = models.create_abstract_model(**micro.MODEL)
    costs = routing.BucketCosts.of_model(model, image_size)
    expected = [model.cost(s, image_size).madds for s in model.routing_space]
    assert costs.buckets.tolist() == expected
    trunks = {
      model.cost_in_parts(s, image_size)[0].madds for s in model.routing_space
    }
    assert trunks == {costs.trunk}

  def test_of_model_counts_what_the_programs_multiply(self):
    model = ds_jax.create_model(**micro.MODEL)
    costs = routing.BucketCosts.of_model(model, 8)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    features = jax.eval_shape(model.trunk, image)
    assert _multiply_adds(model.trunk, image) == costs.trunk
    assert [
      _multiply_adds(functools.partial(model.branch, subnet=s), features)
      for s in model.routing_space
    ] == costs.branches.tolist()

  def test_a_cascade_costs_the_trunk_once_and_the_rungs_it_ran(self):
    model = models.create_abstract_model(**micro.MODEL)
    costs = routing.BucketCosts.of_model(model, 8)
    parts = [model.cost_in_parts(s, 8) for s in model.routing_space]
    gate_logits, logits, labels = _random(60)
    outcomes = _observe(gate_logits, logits, labels)
    router = routing.cascade_router(3, (0, 1, 2), (1.5, 2.0), 'margin')
    ordered = np.sort(logits, axis=-1)
    margins = ordered[..., -1] - ordered[..., -2]
    hand = []
    for margin in margins:
      spent = parts[0][0].madds + parts[0][1].madds
      if margin[0] < 1.5:
        spent += parts[1][1].madds
        if margin[1] < 2.0:
          spent += parts[2][1].madds
      hand.append(spent)
    assert len(set(hand)) == 3
    runs = routing.replay(router, outcomes)
    np.testing.assert_array_equal(costs.of_runs(runs), hand)
