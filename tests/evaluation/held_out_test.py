"""Outcomes of images held out are those of the model run by hand."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import serialization

import fixed
import micro
from ds_jax import checkpoint, evaluation, models, parallel, routing

BATCH, NUM_IMAGES = 8, 21


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


def observe(model, variables, batches, num_devices=1):
  executor = parallel.Executor(devices=jax.devices()[:num_devices])
  evaluator = evaluation.Evaluator(model, normalize, executor)
  return evaluator.held_out(executor.put(variables), batches)


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
  answers = logits.argmax(-1)
  return gate, scores, answers, answers == labels[:, None]


def assert_same(one, other):
  for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_array_equal(x, y)


class HeldOutTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = models.create_abstract_model(**micro.MODEL, gate_head='own')
    cls.batches = make_batches()
    cls.variables = fixed.calibrated_variables(
      cls.model, normalize(cls.batches[0]['images'])
    )
    cls.outcomes = observe(cls.model, cls.variables, cls.batches)
    images, labels = (
      np.concatenate([b[k] for b in cls.batches])[:NUM_IMAGES]
      for k in ('images', 'labels')
    )
    cls.expected = by_hand(cls.model, cls.variables, images, labels)

  def assert_expected(self, outcomes):
    gate, scores, answers, right = self.expected
    assert len(outcomes) == NUM_IMAGES
    # Float32 sums in another order, and far less than images differ by.
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outcomes.gate_logits, gate, **close)
    np.testing.assert_allclose(outcomes.confidence.scores, scores, **close)
    np.testing.assert_array_equal(outcomes.confidence.labels, answers)
    np.testing.assert_array_equal(outcomes.right, right)

  def test_outcomes_are_those_of_the_model_run_by_hand(self):
    self.assert_expected(self.outcomes)

  def test_the_images_tell_the_buckets_apart(self):
    gate, scores, answers, right = self.expected
    # A hundred times what the comparison lets pass.
    assert (gate.std(0) > 1e-3).all() and (scores.std(0) > 1e-3).all()
    assert 0 < right.mean() < 1 and (right[:, 0] != right[:, -1]).any()
    assert len(np.unique(answers)) > 1

  def test_devices_share_a_batch(self):
    self.assert_expected(
      observe(self.model, self.variables, self.batches, num_devices=8)
    )

  def test_outcomes_come_back_from_a_checkpoint(self):
    tree = {'outcomes': serialization.to_state_dict(self.outcomes)}
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder) / 'checkpoints'
      with checkpoint.Checkpointer(folder) as saver:
        saver.save(3, tree, {'phase': 'held_out'})
      restored = checkpoint.restore(folder)
    found = routing.images_held_out(restored.tree)
    for x, y in zip(*map(jax.tree.leaves, (found, self.outcomes)), strict=True):
      np.testing.assert_array_equal(x, y)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))

  def test_stages_hold_no_outcomes(self):
    tree = {'network': serialization.to_state_dict(self.variables)}
    assert routing.images_held_out(tree) is None
