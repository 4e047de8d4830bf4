"""Attention against NumPy in float64."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.nn import attention


def make_input(tokens, dtype=np.float32):
  shape = (3, 2, tokens, 4, 8)
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


def reference(query, key, value):
  """The formula, image by image and head by head."""
  y = np.empty_like(query)
  for n, h in np.ndindex(query.shape[0], query.shape[2]):
    scores = query[n, :, h] @ key[n, :, h].T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y[n, :, h] = weights @ value[n, :, h]
  return y


@pytest.mark.parametrize('tokens', [1, 4, 5])
def test_it_is_the_formula(tokens):
  x = make_input(tokens)
  expected = reference(*x.astype(np.float64))
  np.testing.assert_allclose(attention.attend(*x), expected, rtol=1e-5)
  # What cuDNN is given, by XLA.
  paired = attention.in_pairs(*x, implementation='xla')
  np.testing.assert_allclose(paired, expected, rtol=1e-5)


@pytest.mark.parametrize('tokens', [4, 5])
def test_a_token_of_padding_has_no_gradient(tokens):
  x = make_input(tokens)
  weights = make_input(tokens)[0]

  def total(form):
    return lambda x: (form(*x) * weights).sum()

  def paired(*x):
    return attention.in_pairs(*x, implementation='xla')

  found = jax.grad(total(paired))(jnp.asarray(x))
  expected = jax.grad(total(attention.attend))(jnp.asarray(x))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'dtype, width, goes',
  [('bfloat16', 8, True), ('bfloat16', 4, False), ('float32', 8, False)],
)
def test_what_goes_to_cudnn(dtype, width, goes):
  x = jnp.asarray(make_input(5), dtype)[..., :width]
  with (
    mock.patch.object(attention, '_has_cudnn', lambda: True),
    mock.patch.object(attention, 'in_pairs') as in_pairs,
  ):
    attention.attend(*x)
  assert in_pairs.called == goes
