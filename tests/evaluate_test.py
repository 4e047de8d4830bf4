"""The sweep's sums against counting by hand, and the sweep itself."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import ds_jax
import micro
from ds_jax import evaluate, models
from ds_jax import mesh as mesh_lib


class ResultsTest(parameterized.TestCase):
  """Three buckets and a widest that is none, five images."""

  def setUp(self):
    super().setUp()
    right = [
      [1, 0, 0, 0, 1],
      [1, 1, 0, 0, 0],
      [1, 1, 1, 0, 0],
      [1, 1, 1, 1, 1],
    ]
    self.sweep = evaluate.Sweep(
      top1=np.asarray(right, bool),
      top5=np.ones((4, 5), bool),
      buckets=np.asarray([0, 0, 2, 2, 1]),
    )
    costs = [models.Cost(m, 7) for m in (10, 20, 40, 100)]
    self.results = evaluate.results(self.sweep, costs, 3)

  def test_routed(self):
    routed = self.results['routed']
    # Images 0 and 2 are right: bucket 0 and bucket 2.
    assert routed['top1'] == 2 / 5
    assert routed['madds'] == (10 + 10 + 40 + 40 + 20) / 5
    assert routed['shares'] == [0.4, 0.2, 0.4]

  def test_static_line_lies_between_the_neighbours(self):
    # 24 MAdds are a fifth of the way from 20 (2 right) to 40 (3 right).
    line = self.results['static_line']
    np.testing.assert_allclose(line['top1'], 0.4 + 0.2 * 0.2, rtol=1e-12)
    assert line['madds'] == 24

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

  def test_table_has_a_line_for_each(self):
    text = evaluate.table(self.results)
    for name in ('subnet 3', 'routed', 'static_line', 'random', 'oracle'):
      assert name in text
    assert '40.0% 20.0% 40.0%' in text


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
    evaluator = evaluate.Evaluator(
      self.model,
      self.normalize,
      mesh_lib.make_mesh(jax.devices()[:num_devices]),
    )
    return evaluator.sweep(models.variables_of(self.model), self.batches)

  @parameterized.parameters(1, 8)
  def test_sweep_equals_running_each_sub_network(self, num_devices):
    sweep = self.sweep(num_devices)
    images, labels = self.normalize(self.images[:21]), self.labels[:21]
    for i, subnet in enumerate(models.sub_networks(self.model)):
      predicted = self.model(images, subnet).argmax(-1)
      np.testing.assert_array_equal(sweep.top1[i], predicted == labels)
    # With three classes, the five best are all.
    assert sweep.top5.shape == (4, 21) and sweep.top5.all()
    gate = self.model.gate_logits(self.model.trunk(images)).argmax(-1)
    np.testing.assert_array_equal(sweep.buckets, gate)
