"""Tests of the budget stage: outcomes are those of the model run by hand."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import serialization

import micro
from ds_jax import checkpoint, models, parallel, routing
from ds_jax.train import budget
from models import fixed

BATCH, NUM_IMAGES = 8, 21
SHARES = np.asarray([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batches():
  """Three batches; the last one's last three images are none."""
  rng = np.random.default_rng(1)
  # Of many colours, so that the gate tells them apart.
  images = rng.integers(0, 200, (24, 1, 1, 3))
  images = (images + rng.integers(0, 50, (24, 8, 8, 3))).astype(np.uint8)
  labels = rng.integers(0, 3, 24).astype(np.int32)
  mask = np.arange(24) < NUM_IMAGES
  images[~mask], labels[~mask] = 0, 0
  parts = [np.split(x, 3) for x in (images, labels, mask)]
  return [
    dict(zip(('images', 'labels', 'mask'), batch, strict=True))
    for batch in zip(*parts, strict=True)
  ]


def make_stage(model, num_steps=3, num_devices=1):
  executor = parallel.Executor(devices=jax.devices()[:num_devices])
  return budget.Budget(
    model, normalize, executor=executor, num_steps=num_steps, batch_size=BATCH
  )


def run(stage, state, batches, first=0):
  rows = []
  for step, batch in enumerate(batches, first):
    state, metrics = stage.step(state, batch, step)
    rows.append(metrics)
  return state, rows


def by_hand(model, variables, images, labels):
  """What every bucket says of each image, in NumPy from its logits."""
  bound = models.Architecture(model).bind(variables)
  features = bound.trunk(normalize(images))
  gate = np.asarray(bound.gate_logits(features), np.float64)
  logits = np.stack(
    [bound(normalize(images), s) for s in model.routing_space], 1
  ).astype(np.float64)
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  ordered = np.sort(logits, -1)
  # Not 1 - largest, which rounds to 0.
  *others, largest = np.moveaxis(np.sort(shares, -1), -1, 0)
  scores = np.stack(
    [
      np.log(largest / sum(others)),
      ordered[..., -1] - ordered[..., -2],
      (shares * np.log(shares)).sum(-1),
    ],
    -1,
  )
  mixed = [
    (share * logits[:, 0] + (1 - share) * logits[:, -1]).argmax(-1) == labels
    for share in SHARES
  ]
  answers = logits.argmax(-1)
  return gate, scores, answers, answers == labels[:, None], np.stack(mixed, 1)


def assert_same(one, other):
  for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_array_equal(x, y)


class BudgetTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = models.create_abstract_model(**micro.MODEL, gate_head='own')
    cls.batches = make_batches()
    cls.variables = fixed.calibrated_variables(
      cls.model, normalize(cls.batches[0]['images'])
    )
    cls.stage = make_stage(cls.model)
    cls.state, cls.rows = run(
      cls.stage, cls.stage.init(cls.variables), cls.batches
    )
    images, labels = (
      np.concatenate([b[k] for b in cls.batches])[:NUM_IMAGES]
      for k in ('images', 'labels')
    )
    cls.expected = by_hand(cls.model, cls.variables, images, labels)

  def held_out(self, state):
    return routing.images_held_out(serialization.to_state_dict(state))

  def assert_expected(self, outcomes):
    gate, scores, answers, right, mixed = self.expected
    assert len(outcomes) == NUM_IMAGES
    # Float32 sums in another order, and far less than images differ by.
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outcomes.gate_logits, gate, **close)
    np.testing.assert_allclose(outcomes.confidence.scores, scores, **close)
    np.testing.assert_array_equal(outcomes.confidence.labels, answers)
    np.testing.assert_array_equal(outcomes.right, right)
    np.testing.assert_array_equal(outcomes.mixed, mixed)

  def test_outcomes_are_those_of_the_model_run_by_hand(self):
    self.assert_expected(self.held_out(self.state))

  def test_the_images_tell_the_buckets_and_the_weights_apart(self):
    gate, scores, answers, right, mixed = self.expected
    # A hundred times what the comparison lets pass.
    assert (gate.std(0) > 1e-3).all() and (scores.std(0) > 1e-3).all()
    assert 0 < right.mean() < 1 and (right[:, 0] != right[:, -1]).any()
    assert len(np.unique(answers)) > 1
    assert (mixed[:, 0] != mixed[:, -1]).any()

  def test_each_image_has_a_place_and_what_fills_up_the_batch_is_masked(self):
    assert self.state.mask.shape == (24,)
    np.testing.assert_array_equal(self.state.mask, np.arange(24) < NUM_IMAGES)
    assert self.state.outcomes.right.shape == (24, 3)

  def test_places_that_no_batch_has_reached_are_empty(self):
    state, _ = run(
      self.stage, self.stage.init(self.variables), self.batches[:1]
    )
    np.testing.assert_array_equal(state.mask, np.arange(24) < BATCH)
    for array in jax.tree.leaves(state.outcomes):
      assert not np.asarray(array)[BATCH:].any()
    assert len(self.held_out(state)) == BATCH

  def test_metrics_are_the_shares_of_right_answers(self):
    right = self.expected[3]
    for start, row in zip(range(0, 24, BATCH), self.rows, strict=True):
      # Of the images that there are: five in the last batch.
      found = right[start : start + BATCH].mean(0)
      assert row.keys() == {'right/narrowest', 'right/last'}
      np.testing.assert_allclose(row['right/narrowest'], found[0], rtol=1e-6)
      np.testing.assert_allclose(row['right/last'], found[-1], rtol=1e-6)

  def test_nothing_is_trained(self):
    assert_same(self.state.network, self.variables)

  def test_devices_share_a_batch(self):
    stage = make_stage(self.model, num_devices=8)
    state, _ = run(stage, stage.init(self.variables), self.batches)
    self.assert_expected(self.held_out(state))

  def test_resuming_from_a_checkpoint_gives_the_same(self):
    state, _ = run(
      self.stage, self.stage.init(self.variables), self.batches[:2]
    )
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder) / 'checkpoints'
      with checkpoint.Checkpointer(folder) as saver:
        saver.save(2, serialization.to_state_dict(state), {'stage': 'budget'})
      restored = checkpoint.restore(folder)
    template = self.stage.init(jax.tree.map(jnp.zeros_like, self.variables))
    state = serialization.from_state_dict(template, restored.tree)
    state, _ = run(self.stage, state, self.batches[2:], first=2)
    assert_same(state, self.state)

  def test_outcomes_come_back_from_a_checkpoint(self):
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder) / 'checkpoints'
      with checkpoint.Checkpointer(folder) as saver:
        tree = serialization.to_state_dict(self.state)
        saver.save(3, tree, {'stage': 'budget'})
      restored = checkpoint.restore(folder)
    found = routing.images_held_out(restored.tree)
    self.assert_expected(found)
    rows = jax.tree.map(lambda x: x[:NUM_IMAGES], self.state.outcomes)
    assert_same(found, rows)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))

  def test_other_stages_hold_no_outcomes(self):
    tree = {'network': serialization.to_state_dict(self.variables)}
    assert routing.images_held_out(tree) is None
    fresh = self.stage.init(self.variables)
    assert self.held_out(fresh) is None

  def test_without_images_the_state_is_empty(self):
    stage = make_stage(self.model, num_steps=0)
    state = stage.init(self.variables)
    assert stage.num_steps == 0 and state.mask.shape == (0,)
    assert self.held_out(state) is None
    assert_same(state.network, self.variables)
