"""The sweep's sums against counting by hand, and the sweep itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import ds_jax
import micro
from ds_jax import evaluation, models, parallel, routing
from ds_jax.evaluation import sweep


def _subnets(*names):
  """Sub-networks that are told apart by a name in place of their slices."""
  return tuple(models.Subnet(i, name, ()) for i, name in enumerate(names))


class _Model:
  """Three buckets of 10, 20 and 40 MAdds, and a widest that is none."""

  sub_networks = _subnets('first', 'second', 'last', 'widest')
  routing_space = sub_networks[:3]

  def cost_in_parts(self, subnet, image_size):
    assert image_size == 8
    branch = {'first': 5, 'second': 15, 'last': 35, 'widest': 95}[subnet.stem]
    return models.Cost(5, 3), models.Cost(branch, 4)

  def cost(self, subnet, image_size):
    trunk, branch = self.cost_in_parts(subnet, image_size)
    return trunk + branch


class _TwoBuckets(_Model):
  routing_space = sub_networks = _subnets('first', 'last')


AS_TRAINED = routing.GateTarget()


def outcomes(right, gate_logits=None, scores=None):
  """Outcomes of buckets.

  Args:
    right: (K, N), whether each bucket is right.
    gate_logits: (N, K).
    scores: (N,), every score of the first bucket; all others are sure.
  """
  right = np.asarray(right, bool).T
  num_images, num_buckets = right.shape
  if gate_logits is None:
    gate_logits = np.zeros((num_images, num_buckets))
  confidence = np.full((num_images, num_buckets, 3), 100, np.float32)
  if scores is not None:
    confidence[:, 0] = np.asarray(scores)[:, None]
  return routing.Outcomes(
    np.asarray(gate_logits, np.float32),
    routing.router.Confidence(
      confidence, np.zeros((num_images, num_buckets), np.int32)
    ),
    right,
  )


def sweep_of(found, *, has_widest=True):
  """A sweep of these outcomes, and a widest network that is always right."""
  top1 = found.right.T
  if has_widest:
    top1 = np.concatenate([top1, np.ones_like(top1[:1])])
  return evaluation.Sweep(top1, np.ones_like(top1), found)


def points_of(results, name):
  return {p['budget']: p for p in results['routers'][name]}


RIGHT = [[1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


class ResultsTest(parameterized.TestCase):
  """Three buckets and a widest that is none, five images."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.sweep = sweep_of(
      outcomes(
        RIGHT,
        gate_logits=[
          [3, 1, 0],
          [2.5, 1, 0],
          [0, 1, 3.3],
          [0, 1.5, 3],
          [1, 2.2, 0.4],
        ],
        # The last images are the least sure.
        scores=[5, 4, 3, 2, 1],
      )
    )
    cls.results = evaluation.summarize(
      cls.sweep, _Model(), 8, gate_target=AS_TRAINED
    )

  def test_routed(self):
    routed = self.results['routed']
    # Images 0 and 2 are right: bucket 0 and bucket 2.
    assert routed['top1'] == 2 / 5
    assert routed['top5'] == 1
    assert routed['madds'] == (10 + 10 + 40 + 40 + 20) / 5
    assert routed['shares'] == [0.4, 0.2, 0.4]
    assert self.results['num_images'] == 5

  def test_static_hull_is_the_best_coin(self):
    # 24 MAdds are 14 of the 30 from 10 (2 right) to 40 (3 right); the second
    # bucket, at 20, is right as often as the first.
    hull = self.results['static_hull']
    np.testing.assert_allclose(hull['top1'], 0.4 + 0.2 * 14 / 30, rtol=1e-12)
    assert hull['madds'] == 24

  def test_best_static_costs_no_more(self):
    assert self.results['best_static'] == {'index': 0, 'madds': 10, 'top1': 0.4}

  def test_random_has_the_shares(self):
    expected = 0.4 * 2 / 5 + 0.2 * 2 / 5 + 0.4 * 3 / 5
    np.testing.assert_allclose(
      self.results['random']['top1'], expected, rtol=1e-12
    )

  def test_oracle_takes_the_cheapest_right_bucket(self):
    oracle = self.results['oracle']
    assert oracle['top1'] == 4 / 5
    assert oracle['madds'] == (10 + 20 + 40 + 10 + 10) / 5
    assert oracle['shares'] == [0.6, 0.2, 0.2]

  def test_subnets_end_with_the_widest(self):
    rows = self.results['subnets']
    assert [row['index'] for row in rows] == [0, 1, 2, 3]
    assert rows[-1] == {
      'index': 3, 'madds': 100, 'params': 7, 'top1': 1.0, 'top5': 1.0,
    }  # fmt: skip

  def test_results_are_plain_and_go_to_json(self):
    text = json.dumps(self.results, allow_nan=False)
    assert json.loads(text) == self.results

  def test_every_router_has_points(self):
    assert [*self.results['routers']] == [
      'gate',
      'cascade, probability',
      'cascade, margin',
      'cascade, entropy',
      'cascade, learned',
      'ladder (0, 1, 2)',
    ]

  def test_two_buckets_make_no_ladder(self):
    sweep = sweep_of(
      outcomes(RIGHT[::2], scores=[5, 4, 3, 2, 1]), has_widest=False
    )
    results = evaluation.summarize(
      sweep, _TwoBuckets(), 8, gate_target=AS_TRAINED
    )
    assert not any('ladder' in name for name in results['routers'])
    assert len(results['routers']) == 5

  def test_budgets_are_the_cheapest_and_each_twentieth_of_the_largest(self):
    for name, points in self.results['routers'].items():
      # A twentieth is 2 MAdds, and the cheapest costs 10.
      found = [point['budget'] for point in points]
      expected = [10, *range(12, 41, 2)]
      if name.startswith('ladder'):
        # Its second answers are all alike: past 25 MAdds, when the first are
        # all unsure, every image would go on at once. A step of one image, 6
        # MAdds, and a fiftieth may be missed.
        expected = [budget for budget in expected if budget < 32]
      assert found == expected, name

  @parameterized.parameters('margin', 'entropy', 'probability')
  def test_a_cascade_runs_the_last_bucket_where_it_is_least_sure(self, score):
    points = points_of(self.results, f'cascade, {score}')
    # From image 4 back to image 1, one after the other gets the last bucket's
    # answer: image 4 loses by it, 2 and 1 win.
    right = [2, 1, 1, 2, 3]
    for budget, point in points.items():
      # An image that goes on costs both branches, 35 MAdds more than one that
      # stops, so 7 more of the mean.
      count = round((budget - 10) / 7)
      assert point['madds'] == 10 + 7 * count
      np.testing.assert_allclose(point['top1'], right[count] / 5, rtol=1e-12)
    assert {p['madds'] for p in points.values()} == {10, 17, 24, 31, 38}

  def test_a_point_is_held_against_the_hull_and_the_oracle(self):
    point = points_of(self.results, 'cascade, margin')[38]
    # 38 MAdds are 28 of the 30 from 10 (2 right) to 40 (3 right); enough for
    # the oracle to mend what can be, at 18 MAdds in all.
    expected = {
      'budget': 38,
      'madds': 38,
      'madds_error': 35 * np.sqrt(0.8 * 0.2 / 5),
      'top1': 0.6,
      'hull': 0.4 + 0.2 * 28 / 30,
      'oracle': 0.8,
      'gain': 1 / 75,
      # Per image: 1 - 1, 1 - 14 / 15, 1 - 14 / 15, 0 - 0, 0 - 1 / 15.
      'gain_error': np.std([0, 1 / 15, 1 / 15, 0, -1 / 15]) / np.sqrt(5),
      'captured': 1 / 75 / (0.4 - 0.2 * 28 / 30),
    }
    assert point.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(point[name], value, rtol=1e-9, err_msg=name)

  def test_a_gate_s_budget_ends_at_the_cheapest_and_the_largest(self):
    points = points_of(self.results, 'gate')
    for madds, top1 in ((10, 0.4), (40, 0.6)):
      assert points[madds]['madds'] == madds
      assert points[madds]['top1'] == top1


class HeldOutTest(parameterized.TestCase):
  """Budgets set on other images than they are measured on."""

  def test_budgets_are_set_on_the_images_held_out(self):
    sweep = sweep_of(outcomes(RIGHT, scores=[5, 4, 3, 2, 1]))
    held_out = outcomes(
      [np.arange(10) > 4, np.arange(10) > 2, np.ones(10)],
      scores=[0.4, 0.8, 1.2, 3.2, 3.6, 5, 6, 7, 8, 9],
    )
    of_test, of_held_out = (
      evaluation.summarize(
        sweep, _Model(), 8, gate_target=AS_TRAINED, held_out=images
      )
      for images in (None, held_out)
    )
    assert of_test['budgets_set_on'] == 'test images'
    assert of_held_out['budgets_set_on'] == 'held-out images'
    # 24 MAdds: two of five test images, or four of ten held out, go on. Of the
    # test images, three are less sure than the fifth of those held out.
    one, other = (
      points_of(r, 'cascade, margin')[24] for r in (of_test, of_held_out)
    )
    assert (one['budget'], one['madds'], one['top1']) == (24, 24, 1 / 5)
    assert (other['budget'], other['madds'], other['top1']) == (24, 31, 2 / 5)
    # What needs no budget is of the test images alone.
    for name in ('subnets', 'routed', 'oracle', 'best_static', 'num_images'):
      assert of_test[name] == of_held_out[name]

  @parameterized.parameters(
    # In logits the second image gains more by the last bucket, 3 to 2; in
    # probability the first one does, 0.38 to 0.05.
    ('sandwich', 0.5),
    ('correctness', 1.0),
  )
  def test_the_gate_routes_at_its_target(self, target, top1):
    logits = [[0, -30, 2], [3, -30, 6]]
    held_out = outcomes(np.ones((3, 2)), logits)
    sweep = sweep_of(outcomes([[0, 1], [1, 1], [1, 1]], logits))
    # Enough for one of the two.
    target = routing.GateTarget(target, 25)
    routed = evaluation.summarize(
      sweep, _Model(), 8, gate_target=target, held_out=held_out
    )['routed']
    assert routed['madds'] == 25
    assert routed['shares'] == [0.5, 0, 0.5]
    assert routed['top1'] == top1

  def test_without_images_held_out_the_gate_routes_as_it_was_trained(self):
    logits = [[0, -30, 2], [3, -30, 6]]
    sweep = sweep_of(outcomes(np.ones((3, 2)), logits))
    target = routing.GateTarget('sandwich', 25)
    routed = evaluation.summarize(sweep, _Model(), 8, gate_target=target)[
      'routed'
    ]
    assert routed['shares'] == [0, 0, 1]


class EvaluatorTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = ds_jax.create_model(**micro.MODEL)
    # A trained gate would choose; here a random one does.
    head = cls.model.stages[1][0].gate.slim
    head.kernel[...] = jax.random.normal(jax.random.key(3), head.kernel.shape)
    generator = np.random.default_rng(0)
    cls.images = generator.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    cls.labels = generator.integers(0, 3, 24).astype(np.int32)
    mask = np.arange(24) < 21
    cls.batches = [
      dict(zip(('images', 'labels', 'mask'), part, strict=True))
      for part in zip(
        *(np.split(x, 3) for x in (cls.images, cls.labels, mask)), strict=True
      )
    ]

  def normalize(self, images):
    return images.astype(jnp.float32) / 255

  def sweep(self, num_devices):
    executor = parallel.Executor(devices=jax.devices()[:num_devices])
    evaluator = evaluation.Evaluator(self.model, self.normalize, executor)
    variables = executor.put(models.variables_of(self.model))
    return evaluator.sweep(variables, self.batches)

  @parameterized.parameters(1, 8)
  def test_sweep_equals_running_each_sub_network(self, num_devices):
    sweep = self.sweep(num_devices)
    images, labels = self.normalize(self.images[:21]), self.labels[:21]
    logits = np.stack([self.model(images, s) for s in self.model.sub_networks])
    np.testing.assert_array_equal(sweep.top1, logits.argmax(-1) == labels)
    # With three classes, the five best are all.
    assert sweep.top5.shape == (4, 21) and sweep.top5.all()

    found, buckets = sweep.outcomes, logits[:3].transpose(1, 0, 2)
    assert len(found) == 21
    np.testing.assert_array_equal(
      found.right, buckets.argmax(-1) == labels[:, None]
    )
    np.testing.assert_array_equal(found.confidence.labels, buckets.argmax(-1))
    gate = self.model.gate_logits(self.model.trunk(images))
    np.testing.assert_allclose(found.gate_logits, gate, rtol=1e-4, atol=1e-5)
    ordered = np.sort(buckets, -1)
    # Sums of a program for the whole batch, in float32.
    np.testing.assert_allclose(
      found.confidence.scores[..., 1],
      ordered[..., -1] - ordered[..., -2],
      rtol=1e-4,
      atol=1e-5,
    )

  def routed(self, num_devices, router):
    executor = parallel.Executor(devices=jax.devices()[:num_devices])
    evaluator = evaluation.Evaluator(self.model, self.normalize, executor)
    variables = executor.put(models.variables_of(self.model))
    return evaluator.routed_sweep(variables, router, self.batches)

  @parameterized.parameters('gate', 'cascade')
  def test_routing_on_each_device_equals_one_and_the_sweep(self, kind):
    if kind == 'gate':
      router = routing.gate_router([0.0] * 3)
    else:
      # Half of the images go on from the first bucket to the last.
      margins = self.sweep(1).outcomes.confidence_at(0).scores[:, 1]
      threshold = np.sort(margins)[9:11].mean()
      router = routing.cascade_router(3, (0, 2), [threshold], 'margin')
    one, eight = (self.routed(n, router) for n in (1, 8))
    for found, expected in zip(
      dataclasses.astuple(eight), dataclasses.astuple(one), strict=True
    ):
      np.testing.assert_array_equal(found, expected)
    sweep = self.sweep(1)
    runs = routing.replay(router, sweep.outcomes)
    np.testing.assert_array_equal(one.runs, runs)
    last = np.asarray(routing.last_bucket(runs, 3))
    np.testing.assert_array_equal(
      one.top1, sweep.top1[last, np.arange(len(last))]
    )
    assert len(set(last.tolist())) > 1

  def test_ends_are_the_narrowest_and_the_widest(self):
    executor = parallel.Executor(devices=jax.devices()[:1])
    evaluator = evaluation.Evaluator(self.model, self.normalize, executor)
    variables = executor.put(models.variables_of(self.model))
    found = evaluator.ends(variables, self.batches)
    top1 = self.sweep(1).top1.mean(1)
    np.testing.assert_allclose(found['top1/narrowest'], top1[0], rtol=1e-6)
    np.testing.assert_allclose(found['top1/widest'], top1[-1], rtol=1e-6)
    np.testing.assert_allclose(
      found['top1'], (top1[0] + top1[-1]) / 2, rtol=1e-6
    )


def test_hits_are_the_first_and_the_first_five():
  logits = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
  labels = np.arange(40, dtype=np.int32) % 7
  found = np.asarray(sweep._hits(logits, labels))
  ranks = [
    sorted(row, reverse=True).index(row[label])
    for row, label in zip(logits, labels, strict=True)
  ]
  np.testing.assert_array_equal(found[:, 0], np.less(ranks, 1))
  np.testing.assert_array_equal(found[:, 1], np.less(ranks, 5))
  assert len({tuple(row) for row in found}) == 3
