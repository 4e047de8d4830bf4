"""The predictor against the model run by hand, and its errors."""

import dataclasses
import pathlib
import pickle
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import ds_jax
import micro
import routed
from ds_jax import checkpoint, data, inference, models, routing
from ds_jax import config as config_lib
from ds_jax.inference import parts
from ds_jax.nn import attention
from ds_jax.train import loop


class PredictorTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.images = routed.make_images(40)
    cls.model = routed.make_model(cls.images)
    cls.predictor = inference.Predictor(
      cls.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
    )

  @parameterized.parameters(1, 7, 40)
  def test_each_image_takes_the_branch_of_its_gate(self, batch_size):
    images = self.images[:batch_size]
    prediction = self.predictor(images)
    floats = routed.as_floats(images)
    features = self.model.trunk(floats)
    buckets = np.asarray(self.model.gate_logits(features)).argmax(-1)
    np.testing.assert_array_equal(prediction.buckets, buckets)
    for i, bucket in enumerate(buckets):
      subnet = self.model.routing_space[bucket]
      # A batch of one adds up in another order than a tile.
      np.testing.assert_allclose(
        prediction.logits[i : i + 1],
        self.model(floats[i : i + 1], subnet),
        rtol=1e-4,
        atol=1e-5,
      )
      assert prediction.madds[i] == self.model.cost(subnet, 8).madds
    np.testing.assert_array_equal(
      prediction.labels, prediction.logits.argmax(-1)
    )

  def test_the_test_images_take_several_branches(self):
    assert len(set(self.predictor(self.images).buckets)) > 1

  @parameterized.parameters(0, 2, 3)
  def test_a_bucket_can_be_forced(self, index):
    prediction = self.predictor(self.images[:5], subnet=index)
    floats = routed.as_floats(self.images[:5])
    subnet = self.model.sub_networks[index]
    np.testing.assert_allclose(
      prediction.logits, self.model(floats, subnet), rtol=1e-4, atol=1e-5
    )
    assert (prediction.buckets == index).all()

  @parameterized.parameters(None, 0, 3)
  def test_images_move_in_and_results_out_once(self, subnet):
    self.predictor(self.images[:4], subnet=subnet)
    moves = []

    def counted(move):
      def run(*args, **kwargs):
        moves.append(move.__name__)
        return move(*args, **kwargs)

      return run

    with (
      jax.transfer_guard('disallow'),
      mock.patch.object(jax, 'device_put', counted(jax.device_put)),
      mock.patch.object(jax, 'device_get', counted(jax.device_get)),
    ):
      self.predictor(self.images[:4], subnet=subnet)
    assert moves == ['device_put', 'device_get']

  def test_a_list_of_images_of_many_sizes(self):
    rng = np.random.default_rng(0)
    sizes = ((8, 8, 3), (20, 9, 3), (5, 12, 1), (8, 8, 1))
    images = [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]
    found = self.predictor(images)
    for i, image in enumerate(images):
      alone = self.predictor(image[None])
      assert found.buckets[i] == alone.buckets[0]
      np.testing.assert_allclose(
        found.logits[i], alone.logits[0], rtol=1e-4, atol=1e-5
      )

  @parameterized.parameters(
    (np.zeros((8, 8, 3), np.uint8), r'with image\[None\]'),
    (np.zeros((4, 8, 8), np.uint8), r'with images\[..., None\]'),
    (np.zeros((4, 3, 8, 8), np.uint8), 'channels come last'),
    (np.zeros((4, 8, 8, 3), np.float32), 'before any scaling'),
    (np.zeros((0, 8, 8, 3), np.uint8), 'no images'),
    ([], 'no images'),
    ([np.zeros((8, 8), np.uint8)], r'\(H, W, 3\) .* images\[..., None\]'),
    ([np.zeros((8, 8, 3), np.int64)], 'int64: expected'),
    (np.zeros((2, 0, 8, 3), np.uint8), 'of 0 x 8 pixels: expected at least'),
    ([np.zeros((8, 0, 1), np.uint8)], 'of 8 x 0 pixels: expected at least'),
  )
  def test_other_things_are_refused_with_the_way_out(self, images, message):
    with pytest.raises(ValueError, match=message):
      self.predictor(images)

  @parameterized.parameters('bilinear', 'bicubic')
  def test_images_are_resized_as_it_says(self, interpolation):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3))
    images = images.astype(np.uint8)
    predictor = inference.Predictor(
      self.model,
      image_size=8,
      mean=(0.4,) * 3,
      std=(0.2,) * 3,
      interpolation=interpolation,
    )
    resized = np.stack(
      [data.for_evaluation(i, 8, 1.0, interpolation) for i in images]
    )
    np.testing.assert_array_equal(
      predictor(images).logits, self.predictor(resized).logits
    )

  def test_one_program_for_each_batch_shape(self):
    predictor = inference.Predictor(
      self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
    )
    for batch_size in (3, 3, 5, 3):
      predictor(self.images[:batch_size])
    # Of four images; five run in two of these.
    assert predictor._route._cache_size() == 1
    for batch_size in (1, 16, 17, 16):
      predictor(self.images[:batch_size])
    assert predictor._route._cache_size() == 3  # and of 1, and 16

  @parameterized.parameters(8, 19)
  def test_batches_in_chunks_give_the_same(self, batch_size):
    # Eight images of 8 x 8 pixels at a time, and the rest.
    images = self.images[:batch_size]
    with mock.patch.object(parts, '_CPU_PIXELS', 8 * 64):
      predictor = inference.Predictor(
        self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
      )
      found = predictor(images)
      forced = predictor(images, subnet=3)
    expected = self.predictor(images)
    np.testing.assert_array_equal(found.buckets, expected.buckets)
    for chunked, whole in (
      (found, expected),
      (forced, self.predictor(images, subnet=3)),
    ):
      np.testing.assert_allclose(
        chunked.logits, whole.logits, rtol=1e-4, atol=1e-5
      )

  def test_shared_weights_give_the_same(self):
    shared = inference.Predictor(
      self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3, presliced=False
    )
    ours, theirs = self.predictor(self.images), shared(self.images)
    np.testing.assert_array_equal(ours.buckets, theirs.buckets)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      self.predictor(self.images, subnet=1).logits,
      shared(self.images, subnet=1).logits,
      rtol=1e-4,
      atol=1e-5,
    )

  def test_weights_laid_out_for_a_gpu_give_the_same(self):
    with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
      gpu = inference.Predictor(
        self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
      )
      theirs = gpu(self.images)
    ours = self.predictor(self.images)
    np.testing.assert_array_equal(ours.buckets, theirs.buckets)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    # Outputs first; vectors are packed.
    layouts = {
      (w.ndim, w.format.layout.major_to_minor)
      for w in jax.tree.leaves(gpu.weights)
    }
    assert layouts == {(1, (0,)), (2, (0, 1)), (4, (3, 0, 1, 2))}

  @parameterized.parameters(
    ('jax.experimental.layout.Layout', 'Kernels are not laid out', 'gpu'),
    (
      'ds_jax.inference.preparation.core.jaxpr_as_fun',
      'sliced in every call',
      'cpu',
    ),
    ('ds_jax.inference.preparation.core', 'sliced in every call', 'cpu'),
  )
  def test_a_jax_without_what_makes_it_faster_gives_the_same(
    self, name, warning, backend
  ):
    # Calling what is None is a TypeError, as of one with other arguments.
    with (
      mock.patch(name, None),
      mock.patch.object(jax, 'default_backend', lambda: backend),
      self.assertLogs('absl', 'WARNING') as logs,
    ):
      predictor = inference.Predictor(
        self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
      )
      found = predictor(self.images)
    (record,) = logs.records
    assert warning in record.getMessage()
    expected = self.predictor(self.images)
    np.testing.assert_array_equal(found.buckets, expected.buckets)
    np.testing.assert_allclose(
      found.logits, expected.logits, rtol=1e-4, atol=1e-5
    )

  def test_attention_is_fused_here_alone(self):
    model = models.create_abstract_model('ds_vit_cifar')
    here = parts.SharedParts(model, lambda x: x, 32)
    written = parts.SharedParts(model, lambda x: x, 32, platform='cuda')
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda: models.variables_of(model))

    def fused(run):
      with mock.patch.object(
        attention, 'softmax_attention', side_effect=lambda q, k, v, fused: v
      ) as asked:
        jax.eval_shape(run, variables, images)
      return {call.kwargs['fused'] for call in asked.mock_calls}

    subnet = model.routing_space[0]
    assert fused(lambda v, x: here.network(v).trunk(x)) == {True}
    assert fused(lambda v, x: here.run(v, x, subnet)) == {True}
    assert fused(lambda v, x: written.network(v).trunk(x)) == {False}
    # What is trained and evaluated.
    architecture = models.Architecture(model)
    assert fused(lambda v, x: architecture.bind(v)(x, subnet)) == {False}

  def test_another_size_is_resized_as_in_evaluation(self):
    large = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 3))
    large = large.astype(np.uint8)
    small = np.stack([data.for_evaluation(i, 8) for i in large])
    np.testing.assert_array_equal(
      self.predictor(large).logits, self.predictor(small).logits
    )

  def test_grey_is_repeated(self):
    grey = self.images[:2, :, :, :1]
    np.testing.assert_array_equal(
      self.predictor(grey).logits,
      self.predictor(np.repeat(grey, 3, -1)).logits,
    )

  @parameterized.parameters(-1, 4)
  def test_a_sub_network_that_is_none_is_refused(self, index):
    with pytest.raises(ValueError, match=r'expected 0 \(narrowest\) to 3'):
      self.predictor(self.images[:1], subnet=index)


class BudgetTest(parameterized.TestCase):
  """Budgets set on 60 images; the first 24 of them are classified."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    images = routed.make_images(60)
    cls.model = routed.make_model(images, gate_head='own')
    labels = np.random.default_rng(3).integers(0, 3, 60).astype(np.int32)
    floats = routed.as_floats(images)
    space = cls.model.routing_space
    logits = jnp.stack([cls.model(floats, s) for s in space], 1)
    gate_logits = cls.model.gate_logits(cls.model.trunk(floats))
    cls.held_out = jax.tree.map(
      np.asarray, routing.observe(gate_logits, logits, labels)
    )
    cls.logits = np.asarray(logits, np.float64)
    cls.gate_logits = np.asarray(gate_logits, np.float64)
    cls.images = images
    cls.costs = [cls.model.cost_in_parts(s, 8) for s in space]
    cls.trunk = cls.costs[0][0].madds
    cls.branches = np.asarray([branch.madds for _, branch in cls.costs])
    cls.predictor = cls.make()

  @classmethod
  def make(cls, **options):
    return inference.Predictor(
      cls.model,
      image_size=8,
      mean=(0.4,) * 3,
      std=(0.2,) * 3,
      **{'held_out': cls.held_out, **options},
    )

  def assert_answers(self, prediction, buckets):
    """Each image has the answer of its bucket, which is the model's."""
    expected = self.logits[np.arange(len(buckets)), buckets]
    np.testing.assert_array_equal(prediction.buckets, buckets)
    # A tile adds up in another order than the whole batch.
    np.testing.assert_allclose(
      prediction.logits, expected, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(
      prediction.labels, prediction.logits.argmax(-1)
    )

  def assert_spends(self, prediction, madds):
    """On the images that it is set on, to one image more or less."""
    step = (self.trunk + self.branches.sum()) / len(self.images)
    assert abs(prediction.madds.mean() - madds) <= 0.02 * madds + step

  def test_the_answers_and_the_gate_tell_images_and_buckets_apart(self):
    # Thousands of times what the comparisons let pass.
    assert (self.logits.std(0) > 0.05).all()
    assert (np.ptp(self.logits, 1).mean(0) > 0.05).all()
    assert (self.gate_logits.std(0) > 0.05).all()

  @parameterized.parameters(0.84, 0.9, 0.96)
  def test_gate_keeps_a_budget_by_a_price(self, fraction):
    largest = self.trunk + self.branches[-1]
    assert self.trunk + self.branches[0] < 0.8 * largest
    prediction = self.predictor.with_budget(fraction=fraction)(self.images)
    self.assert_answers(prediction, prediction.buckets)
    self.assert_spends(prediction, fraction * largest)
    np.testing.assert_array_equal(
      prediction.madds, self.trunk + self.branches[prediction.buckets]
    )
    # Some price makes these very choices.
    shares = (self.branches - self.branches[0]) / np.ptp(self.branches)
    utilities = self.gate_logits[None] - (
      np.linspace(-20, 20, 40001)[:, None, None] * shares[None, None]
    )
    agrees = (utilities.argmax(-1) == prediction.buckets[None]).mean(1)
    # An image at the very price may fall on either side.
    assert agrees.max() >= 1 - 1 / len(self.images)

  @parameterized.parameters(0, 2)
  def test_gate_s_ends_send_all_images_to_one_bucket(self, bucket):
    madds = float(self.trunk + self.branches[bucket])
    predictors = [self.predictor.with_budget(madds=madds)]
    if bucket == 2:
      predictors.append(self.predictor.with_budget(fraction=1.0))
    for predictor in predictors:
      prediction = predictor(self.images[:24])
      expected = self.logits[:24, bucket]
      np.testing.assert_allclose(
        prediction.logits, expected, rtol=1e-4, atol=1e-5
      )
      assert (prediction.buckets == bucket).all()
      assert (prediction.madds == madds).all()

  def sureness(self, score, bucket):
    logits = self.logits[:, bucket]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    ordered = np.sort(logits, -1)
    return {
      'probability': shares.max(-1),
      'margin': ordered[:, -1] - ordered[:, -2],
      'entropy': (shares * np.log(shares)).sum(-1),
    }[score]

  @parameterized.parameters('probability', 'margin', 'entropy')
  def test_a_cascade_goes_on_where_the_first_answer_is_least_sure(self, score):
    madds = self.trunk + self.branches[0] + 0.4 * self.branches[-1]
    predictor = self.predictor.with_budget(
      madds=madds, router='cascade', score=score
    )
    prediction = predictor(self.images)
    self.assert_spends(prediction, madds)
    # 0.4 of the images, to one of them.
    goes_on = prediction.buckets == 2
    count = goes_on.sum()
    assert abs(count - 24) <= 2
    least = np.argsort(self.sureness(score, 0))[:count]
    assert set(least) == set(np.flatnonzero(goes_on))
    self.assert_answers(prediction, np.where(goes_on, 2, 0))
    # Both branches ran for these, and the trunk once.
    both = self.trunk + self.branches[0] + self.branches[2]
    np.testing.assert_array_equal(
      prediction.madds, np.where(goes_on, both, self.trunk + self.branches[0])
    )

  def test_a_cascade_spends_more_on_nothing_but_every_branch(self):
    most = float(self.trunk + self.branches[[0, 2]].sum())
    assert most > self.trunk + self.branches[2]
    prediction = self.predictor.with_budget(madds=most, router='cascade')(
      self.images[:24]
    )
    self.assert_answers(prediction, np.full(24, 2))
    assert (prediction.madds == most).all()

  def test_a_ladder_counts_every_rung(self):
    madds = self.trunk + self.branches[0] + 0.5 * self.branches[1:].sum()
    predictor = self.predictor.with_budget(
      madds=madds, router='cascade', ladder=(0, 1, 2)
    )
    prediction = predictor(self.images)
    self.assert_spends(prediction, madds)
    self.assert_answers(prediction, prediction.buckets)
    assert set(prediction.buckets) == {0, 1, 2}
    spent = self.trunk + np.cumsum(self.branches)
    np.testing.assert_array_equal(prediction.madds, spent[prediction.buckets])

  def test_a_ladder_may_leave_out_buckets(self):
    predictor = self.predictor.with_budget(
      madds=self.trunk + self.branches[1] + 0.5 * self.branches[2],
      router='cascade',
      ladder=(1, 2),
    )
    prediction = predictor(self.images)
    assert set(prediction.buckets) == {1, 2}
    both = self.trunk + self.branches[1] + self.branches[2]
    np.testing.assert_array_equal(
      prediction.madds,
      np.where(prediction.buckets == 2, both, self.trunk + self.branches[1]),
    )

  def test_a_learned_score_is_a_rule_on_the_first_answer(self):
    madds = self.trunk + self.branches[0] + 0.4 * self.branches[-1]
    predictor = self.predictor.with_budget(
      madds=madds, router='cascade', score='learned'
    )
    prediction = predictor(self.images)
    self.assert_spends(prediction, madds)
    self.assert_answers(prediction, prediction.buckets)
    head = predictor.router.learned
    scores = self.held_out.confidence.scores[:, 0].astype(np.float64)
    labels = self.logits[:, 0].argmax(-1)
    sureness = scores @ np.asarray(head.weights, np.float64)
    sureness += np.append(np.asarray(head.biases, np.float64), [0] * 3)[labels]
    goes_on = prediction.buckets == 2
    assert 0 < goes_on.sum() < 60
    assert sureness[goes_on].max() <= sureness[~goes_on].min() + 1e-5

  def test_budgets_are_of_a_new_predictor(self):
    predictor = self.make()
    before = predictor(self.images[:24])
    cheap = predictor.with_budget(madds=float(self.trunk + self.branches[0]))
    assert (cheap(self.images[:24]).buckets == 0).all()
    after = predictor(self.images[:24])
    for field in ('logits', 'buckets', 'madds'):
      np.testing.assert_array_equal(
        getattr(before, field), getattr(after, field)
      )
    assert before.buckets.any()

  def test_another_budget_compiles_nothing(self):
    predictor, images = self.make(), self.images[:8]
    size = predictor._route._cache_size
    predictor(images)
    assert size() == 1
    for fraction in (0.85, 0.9, 1.0):
      predictor.with_budget(fraction=fraction)(images)
    assert size() == 1
    # Another kind of router is another program, and for all of its budgets.
    for count, options in enumerate(
      (
        dict(score='margin'),
        dict(score='entropy'),
        dict(score='learned'),
        dict(ladder=(0, 1, 2)),
      ),
      2,
    ):
      for fraction in (0.85, 0.9, 1.0):
        other = predictor.with_budget(
          fraction=fraction, router='cascade', **options
        )
        other(images)
        assert size() == other._route._cache_size() == count

  @parameterized.parameters(
    ('sandwich', None), ('sandwich', 0.85), ('correctness', 0.85)
  )
  def test_without_a_budget_the_gate_keeps_its_target(self, target, share):
    largest = self.trunk + self.branches[-1]
    madds = share and share * largest
    predictor = self.make(gate_target=routing.GateTarget(target, madds))
    prediction = predictor(self.images)
    self.assert_answers(prediction, prediction.buckets)
    if share:
      self.assert_spends(prediction, madds)
    else:
      chosen = self.gate_logits.argmax(-1)
      np.testing.assert_array_equal(prediction.buckets, chosen)

  def test_a_gate_of_correctness_weighs_probabilities(self):
    """Which are other choices at the same cost than those of the logits."""
    largest = float(self.trunk + self.branches[-1])
    chosen = {}
    for target in ('sandwich', 'correctness'):
      gate_target = routing.GateTarget(target)
      predictor = self.make(gate_target=gate_target).with_budget(
        madds=0.9 * largest
      )
      chosen[target] = predictor(self.images).buckets
    shares = (self.branches - self.branches[0]) / np.ptp(self.branches)
    prices = np.linspace(-3, 3, 40001)[:, None, None]
    probability = 1 / (1 + np.exp(-self.gate_logits))
    utilities = probability[None] - prices * shares[None, None]
    agrees = (utilities.argmax(-1) == chosen['correctness'][None]).mean(1)
    assert agrees.max() >= 1 - 1 / len(self.images)
    assert (chosen['sandwich'] != chosen['correctness']).sum() > 2

  @parameterized.parameters(
    ({}, r'madds=None, fraction=None\): expected one of the two'),
    (
      {'madds': 5e3, 'fraction': 0.5},
      r'madds=5000.0, fraction=0.5\): expected one of the two',
    ),
    (
      {'fraction': 0.9, 'router': 'random'},
      "router='random': expected 'gate' or 'cascade'",
    ),
    (
      {'fraction': 0.9, 'router': 'cascade', 'score': 'luck'},
      "score='luck': expected 'probability' or 'margin'",
    ),
    (
      {'fraction': 0.9, 'router': 'cascade', 'ladder': (2, 0)},
      r'ladder=\(2, 0\): expected .* buckets \(0, 1, 2\), rising',
    ),
    (
      {'fraction': 0.9, 'router': 'cascade', 'ladder': (0, 3)},
      r'ladder=\(0, 3\): expected .* buckets \(0, 1, 2\), rising',
    ),
  )
  def test_budgets_that_make_no_sense_are_refused(self, options, message):
    with pytest.raises(ValueError, match=message):
      self.predictor.with_budget(**options)

  @parameterized.parameters('gate', 'cascade')
  def test_a_budget_out_of_range_names_the_range(self, router):
    low = self.trunk + self.branches[0]
    high = self.trunk + self.branches[2]
    if router == 'cascade':
      high += self.branches[0]
    for madds in (low - 1, high + 1):
      with pytest.raises(routing.BudgetError) as raised:
        self.predictor.with_budget(madds=madds, router=router)
      assert f'spends {low:,} to {high:,}.' in str(raised.value)
    for madds in (low, high):
      self.predictor.with_budget(madds=madds, router=router)

  def test_without_images_held_out_there_are_no_budgets(self):
    predictor = self.make(held_out=None)
    for router in ('gate', 'cascade'):
      with pytest.raises(ValueError, match='config.dataset.budget_share'):
        predictor.with_budget(fraction=0.9, router=router)

  def test_an_untrained_gate_routes_nothing_and_a_cascade_needs_none(self):
    predictor = self.make(has_gate=False)
    with pytest.raises(ValueError, match='before the end of Stage II'):
      predictor(self.images[:4])
    with pytest.raises(ValueError, match='before the end of Stage II'):
      predictor.with_budget(fraction=0.9)(self.images[:4])
    cascade = predictor.with_budget(fraction=0.9, router='cascade')
    assert cascade(self.images[:4]).logits.shape == (4, 3)

  def test_widest_that_is_no_bucket_reports_its_own_madds(self):
    assert self.model.widest.index == 3
    prediction = self.predictor(self.images[:5], subnet=3)
    widest = self.model.cost(self.model.widest, 8).madds
    assert widest > self.trunk + self.branches[2]
    assert (prediction.madds == widest).all()
    assert (prediction.buckets == 3).all()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that held images out: (config, workdir, results)."""
  workdir = tmp_path_factory.mktemp('run')
  config = micro.get_config()
  config.dataset.name = micro.write_images(workdir)
  config.dataset.budget_share = 0.25
  config.supernet.num_epochs = 1.0
  config.gate.num_epochs = 1.0
  config.calibrate.num_batches = 2
  config.checkpoint.keep_last = 100
  return config, workdir, loop.train(config, workdir)


def part_of(config, part):
  """The images and labels of a part of the data set."""
  source = data.load_part(
    config_lib.Experiment.from_config(config).dataset, part
  )
  examples = [source[i] for i in range(len(source))]
  return (
    np.stack([example['image'] for example in examples]),
    np.asarray([example['label'] for example in examples]),
  )


def test_restores_a_run_as_it_was_evaluated(run):
  config, workdir, results = run
  images, labels = part_of(config, 'test')
  predictor = ds_jax.Predictor.restore(workdir)
  prediction = predictor(images)
  assert (prediction.labels == labels).mean() == results['routed']['top1']
  np.testing.assert_allclose(
    prediction.madds.mean(), results['routed']['madds'], rtol=1e-9
  )
  for row in results['subnets']:
    forced = predictor(images, subnet=row['index'])
    assert (forced.labels == labels).mean() == row['top1']
  for point in results['routers']['cascade, margin']:
    cascade = predictor.with_budget(madds=point['budget'], router='cascade')
    prediction = cascade(images)
    np.testing.assert_allclose(
      prediction.madds.mean(), point['madds'], rtol=1e-9
    )
    assert (prediction.labels == labels).mean() == point['top1']


def test_restores_a_run_from_before_stage_ii(run, tmp_path):
  config, workdir, _ = run
  images, _ = part_of(config, 'test')
  early = checkpoint.restore(checkpoint.directory_of(workdir), step=3)
  assert early.meta['phase'] == 'supernet'
  with checkpoint.Checkpointer(
    checkpoint.directory_of(tmp_path / 'early')
  ) as saver:
    saver.save(3, early.tree, early.meta)
  predictor = ds_jax.Predictor.restore(tmp_path / 'early')
  assert predictor(images, subnet=0).logits.shape == (40, 3)
  with pytest.raises(ValueError, match='before the end of Stage II'):
    predictor(images)


def test_budgets_are_kept_on_the_images_held_out(run):
  config, workdir, _ = run
  images, _ = part_of(config, 'budget')
  assert len(images) == 20
  predictor = ds_jax.Predictor.restore(workdir)
  costs = [
    predictor.model.cost(s, 8).madds for s in predictor.model.routing_space
  ]
  # One image more or less.
  step = 2 * np.ptp(costs) / 20
  for madds in (4e3, 0.5 * (costs[0] + costs[-1])):
    cascade = predictor.with_budget(madds=madds, router='cascade')
    spent = cascade(images).madds.mean()
    assert abs(spent - madds) <= 0.02 * madds + step


def test_restoring_nothing_says_so(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match='No checkpoints in'):
    ds_jax.Predictor.restore(tmp_path / 'nothing')


@pytest.mark.parametrize('router', [None, 'cascade'])
def test_a_predictor_pickles_as_its_workdir_and_router(run, router):
  config, workdir, _ = run
  images, _ = part_of(config, 'test')
  predictor = ds_jax.Predictor.restore(workdir)
  if router:
    whole = predictor
    predictor = whole.with_budget(fraction=0.9, router=router)
    # A copy is no pickle: it restores and compiles nothing.
    assert predictor._route is whole._route
  pickled = pickle.dumps(predictor)
  # No weights.
  assert len(pickled) < 5_000
  found, expected = pickle.loads(pickled)(images), predictor(images)
  for one, other in zip(
    dataclasses.astuple(found), dataclasses.astuple(expected), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_a_predictor_of_a_model_in_memory_does_not_pickle():
  model = models.create_model(**micro.MODEL)
  predictor = inference.Predictor(
    model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3, presliced=False
  )
  with pytest.raises(TypeError, match='use Predictor.restore, or save the'):
    pickle.dumps(predictor)


def test_a_run_of_format_1_restores_and_predicts():
  """Written by the commit before the formats had numbers, with its answers."""
  workdir = pathlib.Path(__file__).parents[1] / 'checkpoint_format_1'
  expected = np.load(workdir / 'predictions.npz')
  predictor = inference.Predictor.restore(workdir)
  found = predictor(expected['images'])
  np.testing.assert_array_equal(found.buckets, expected['buckets'])
  np.testing.assert_allclose(
    found.logits, expected['logits'], rtol=1e-4, atol=1e-5
  )
  cascade = predictor.with_budget(fraction=0.9, router='cascade')
  found = cascade(expected['images'])
  np.testing.assert_array_equal(found.buckets, expected['cascade_buckets'])
  np.testing.assert_array_equal(found.madds, expected['cascade_madds'])
