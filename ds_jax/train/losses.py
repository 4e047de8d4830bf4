"""The losses of Stages I and II, as pure functions.

Axes: N batch, C classes, K buckets. All arithmetic is float32.
"""

import jax
import jax.numpy as jnp
import optax

from ds_jax import config, validation


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  label_smoothing: float = 0.0,
  balanced_over: jax.Array | None = None,
) -> jax.Array:
  """Mean cross-entropy of logits (N, C) to labels.

  Args:
    logits: (N, C).
    labels: integers (N,), or the probabilities (N, C) of a mixed batch.
    label_smoothing: share of the uniform distribution in the targets. Of mixed
      labels each is smoothed, which smooths the mixture.
    balanced_over: integer labels (M,), these among them: those that occur there
      all weigh the same, however many rows have them. The mean is then one over
      all M, of which there are N here.
  """
  if labels.ndim == 1:
    probabilities = jax.nn.one_hot(labels, logits.shape[-1])
  else:
    probabilities = labels
  targets = optax.smooth_labels(probabilities, label_smoothing)
  if balanced_over is None:
    return soft_cross_entropy(logits, targets)
  counts = jax.nn.one_hot(balanced_over, logits.shape[-1]).sum(0)
  weights = len(balanced_over) / (counts[labels] * (counts > 0).sum())
  return (optax.softmax_cross_entropy(logits, targets) * weights).mean()


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross-entropy of logits (N, C) to probabilities (N, C)."""
  return optax.softmax_cross_entropy(logits, targets).mean()


def dominant(labels: jax.Array) -> jax.Array:
  """Returns each row's one label (N,), of a mixed batch the likelier.

  Args:
    labels: integers (N,), which are given back; or probabilities (N, C), of
      which two alike give the lower label.
  """
  return labels if labels.ndim == 1 else labels.argmax(-1).astype(jnp.int32)


def label_probability(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns (..., N), softmax of logits (..., N, C) at labels (N,)."""
  labels = jnp.broadcast_to(labels, logits.shape[:-1])
  return jnp.take_along_axis(
    jax.nn.softmax(logits), labels[..., None], axis=-1
  )[..., 0]


def sandwich_labels(
  correct: jax.Array, hard_images: str = 'try_best'
) -> jax.Array:
  """Labels of sandwich gate sparsification (DS-Net, section 3.4).

  Easy images (the narrowest bucket is right) get the first bucket, dependent
  ones (only the widest bucket is right) the last, and hard ones (both are
  wrong) the last (`try_best`) or the first (`give_up`).

  Args:
    correct: (N, K) bool, whether bucket k classifies the image rightly.
    hard_images: `try_best` or `give_up`.

  Returns:
    (N,) int32, 0 or K - 1.

  Raises:
    ValueError: for another `hard_images`.
  """
  validation.check_choice('hard_images', hard_images, config.HARD_IMAGES)
  easy, last = correct[:, 0], correct[:, -1]
  to_first = easy if hard_images == 'try_best' else easy | ~last
  return jnp.where(to_first, 0, correct.shape[1] - 1).astype(jnp.int32)


def straight_through_gumbel(
  noise: jax.Array, logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """A one-hot sample of softmax(logits) with the relaxed sample's gradient.

  Args:
    noise: (N, K), Gumbel noise.
    logits: (N, K).
    temperature: of the relaxed sample.

  Returns:
    (N, K): one-hot in value, `softmax((logits + noise) / temperature)` in
    gradient.
  """
  noisy = (logits + noise) / temperature
  soft = jax.nn.softmax(noisy)
  hard = jax.nn.one_hot(noisy.argmax(-1), logits.shape[-1])
  # Grouped so that the forward value is `hard` to the bit.
  return hard + (soft - jax.lax.stop_gradient(soft))
