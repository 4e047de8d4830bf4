"""Tests of the losses against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax.train import losses


def random_logits(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def softmax(logits):
  shifted = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
  return shifted / shifted.sum(-1, keepdims=True)


class CrossEntropyTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1, 0.5)
  def test_equals_its_formula(self, label_smoothing):
    logits = random_logits(7, 5)
    labels = np.arange(7, dtype=np.int32) % 5
    log = np.log(softmax(logits))
    expected = np.mean(
      [
        -(1 - label_smoothing) * row[label] - label_smoothing * row.mean()
        for row, label in zip(log, labels, strict=True)
      ]
    )
    found = losses.cross_entropy(logits, labels, label_smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  @parameterized.parameters(0.0, 0.1)
  def test_balanced_labels_equal_their_formula(self, label_smoothing):
    """The mean over the labels that occur of the mean over their rows."""
    logits = random_logits(7, 5)
    # One row of 0, two of 3, four of 1, none of the rest.
    labels = np.asarray([3, 1, 1, 0, 3, 1, 1], np.int32)
    log = np.log(softmax(logits))
    rows = -(1 - label_smoothing) * log[np.arange(7), labels]
    rows -= label_smoothing * log.mean(-1)
    expected = np.mean([rows[labels == label].mean() for label in (0, 1, 3)])
    found = losses.cross_entropy(logits, labels, label_smoothing, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(expected - rows.mean()) > 0.01

  def test_balanced_labels_have_the_gradient_of_their_formula(self):
    logits = random_logits(7, 5)
    labels = np.asarray([3, 1, 1, 0, 3, 1, 1], np.int32)
    counts = np.asarray([2, 4, 4, 1, 2, 4, 4])
    expected = (softmax(logits) - np.eye(5)[labels]) / (3 * counts[:, None])
    found = jax.grad(losses.cross_entropy)(
      jnp.asarray(logits), labels, balanced_over=labels
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

  def test_one_label_alone_is_balanced(self):
    logits, labels = random_logits(7, 5), np.full(7, 2, np.int32)
    np.testing.assert_allclose(
      losses.cross_entropy(logits, labels, balanced_over=labels),
      losses.cross_entropy(logits, labels),
      rtol=1e-6,
    )

  def test_soft_targets_equal_their_formula(self):
    logits, targets = random_logits(7, 5), softmax(random_logits(7, 5, seed=1))
    found = losses.soft_cross_entropy(logits, jnp.asarray(targets, jnp.float32))
    expected = -(targets * np.log(softmax(logits))).sum(-1).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  def test_huge_logits_stay_finite(self):
    logits = jnp.asarray([[1e4, -1e4]])
    assert losses.cross_entropy(logits, jnp.asarray([0])) == 0
    assert losses.cross_entropy(logits, jnp.asarray([1])) == 2e4


class LabelProbabilityTest(parameterized.TestCase):
  def test_is_the_softmax_at_the_label(self):
    logits = random_logits(3, 7, 5)
    labels = np.arange(7, dtype=np.int32) % 5
    found = losses.label_probability(logits, labels)
    assert found.shape == (3, 7)
    for bucket, image in np.ndindex(3, 7):
      expected = softmax(logits[bucket, image])[labels[image]]
      np.testing.assert_allclose(found[bucket, image], expected, rtol=1e-6)

  def test_huge_logits_stay_finite(self):
    logits = jnp.asarray([[1e4, -1e4]])
    assert losses.label_probability(logits, jnp.asarray([0])) == 1
    assert losses.label_probability(logits, jnp.asarray([1])) == 0


class SandwichLabelsTest(parameterized.TestCase):
  # Narrowest right: easy. Narrowest wrong, widest right: dependent. Both wrong:
  # hard. What the buckets between say does not matter.
  @parameterized.parameters(*itertools.product((False, True), repeat=2))
  def test_easy_goes_first_dependent_and_hard_go_last(self, *between):
    correct = jnp.asarray(
      [(easy, *between, last) for easy in (1, 0) for last in (1, 0)], bool
    )
    found = losses.sandwich_labels(correct)
    np.testing.assert_array_equal(found, [0, 0, 3, 3])
    assert found.dtype == jnp.int32
    found = losses.sandwich_labels(correct, 'try_best')
    np.testing.assert_array_equal(found, [0, 0, 3, 3])
    found = losses.sandwich_labels(correct, 'give_up')
    np.testing.assert_array_equal(found, [0, 0, 3, 0])

  def test_another_word_is_refused(self):
    with pytest.raises(ValueError, match="hard_images='skip': expected 'try_b"):
      losses.sandwich_labels(jnp.zeros((2, 3), bool), 'skip')


class StraightThroughGumbelTest(parameterized.TestCase):
  def test_value_is_a_one_hot_to_the_bit(self):
    logits = random_logits(1000, 5)
    noise = jax.random.gumbel(jax.random.key(0), logits.shape)
    found = losses.straight_through_gumbel(noise, logits, 0.7)
    found = np.asarray(found)
    assert ((found == 0) | (found == 1)).all() and (found.sum(-1) == 1).all()

  def test_samples_follow_the_softmax(self):
    logits = random_logits(1, 5)
    many = jnp.tile(logits, (20_000, 1))
    noise = jax.random.gumbel(jax.random.key(1), many.shape)
    found = losses.straight_through_gumbel(noise, many)
    # Five standard errors of a share.
    error = 5 * np.sqrt(0.25 / 20_000)
    np.testing.assert_allclose(
      np.asarray(found).mean(0), softmax(logits)[0], rtol=0, atol=error
    )

  @parameterized.parameters(1.0, 0.5)
  def test_gradient_of_the_routed_loss_is_the_relaxed_sample_s(
    self, temperature
  ):
    """To the gate's logits, of the cross-entropy of z = sum_k g_k z_k."""
    gate_logits, outputs = random_logits(6, 4), random_logits(6, 4, 5, seed=1)
    labels = np.arange(6, dtype=np.int32) % 5

    noise = jax.random.gumbel(jax.random.key(2), gate_logits.shape)

    def ours(gate_logits):
      one_hot = losses.straight_through_gumbel(noise, gate_logits, temperature)
      routed = jnp.einsum('nk,nkc->nc', one_hot, outputs)
      return losses.cross_entropy(routed, labels)

    found = jax.jit(jax.grad(ours))(gate_logits)

    def relaxed(gate_logits):
      return softmax((gate_logits + np.float64(noise)) / temperature)

    start = relaxed(gate_logits)
    hard = np.eye(4)[start.argmax(-1)]

    def surrogate(gate_logits):
      mix = hard + relaxed(gate_logits) - start
      log = np.log(softmax(np.einsum('nk,nkc->nc', mix, outputs)))
      return -log[np.arange(6), labels].mean()

    differences = np.zeros((6, 4))
    for index in np.ndindex(6, 4):
      step = np.zeros((6, 4))
      step[index] = 1e-5
      change = surrogate(gate_logits + step) - surrogate(gate_logits - step)
      differences[index] = change / 2e-5
    # The same on paper: softmax's Jacobian after the outputs' products.
    error = softmax(np.einsum('nk,nkc->nc', hard, outputs)) - np.eye(5)[labels]
    dmix = np.einsum('nc,nkc->nk', error, outputs) / 6
    centred = dmix - (start * dmix).sum(-1, keepdims=True)
    analytic = start * centred / temperature
    # Central differences are good to the square of their step.
    np.testing.assert_allclose(analytic, differences, rtol=0, atol=1e-8)
    assert np.abs(analytic).max() > 0.01
    np.testing.assert_allclose(found, analytic, rtol=1e-4, atol=1e-6)
