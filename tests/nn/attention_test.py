"""Attention against NumPy in float64, and where cuDNN is taken."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.nn import attention

# Of an odd number of tokens.
_SHAPE = 2, 5, 3, 8


def _inputs():
  rng = np.random.default_rng(0)
  return [rng.normal(size=_SHAPE).astype(np.float32) for _ in range(3)]


_by_xla = functools.partial(attention.softmax_attention, fused=False)


def _by_hand(query, key, value):
  query, key, value = (np.float64(x) for x in (query, key, value))
  scores = np.einsum('nqhd,nkhd->nhqk', query, key) / np.sqrt(_SHAPE[-1])
  weights = np.exp(scores)
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('nhqk,nkhd->nqhd', weights, value)


def test_equals_softmax_by_hand():
  inputs = _inputs()
  result = jax.jit(_by_xla)(*inputs)
  # Sums of a few float32 numbers near 1.
  np.testing.assert_allclose(result, _by_hand(*inputs), rtol=1e-5, atol=1e-6)


def test_gradients_equal_differences():
  inputs, dy = _inputs(), np.random.default_rng(1).normal(size=_SHAPE)

  def loss(*inputs):
    return (_by_xla(*inputs) * dy).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
  for i, gradient in enumerate(gradients):
    direction = np.random.default_rng(2 + i).normal(size=_SHAPE)
    moved = []
    for step in (-1e-4, 1e-4):
      there = [np.float64(x) for x in inputs]
      there[i] += step * direction
      moved.append((_by_hand(*there) * dy).sum())
    slope = (moved[1] - moved[0]) / 2e-4
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4)


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, True),
    ({'dtype': jnp.float32}, False),
    ({'head_dim': 12}, False),
    ({'head_dim': 256}, False),
    ({'dtype': jnp.float16}, True),
    ({'head_dim': 128}, True),
    ({'head_dim': 136}, False),
    ({'capability': '7.5'}, False),
    ({'capability': '8.0'}, True),
    ({'capability': '12.0'}, True),
    ({'backend': 'cpu'}, False),
    ({'version': 'rocm 7'}, False),
  ],
)
def test_cudnn_is_taken_where_it_can(changes, expected, monkeypatch):
  options = {
    'dtype': jnp.bfloat16,
    'head_dim': 64,
    'capability': '9.0',
    'backend': 'gpu',
    'version': 'cuda 13000',
  } | changes
  device = mock.Mock(compute_capability=options['capability'])
  device.client.platform_version = options['version']
  monkeypatch.setattr(jax, 'default_backend', lambda: options['backend'])
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  has = attention._has_cudnn(jnp.dtype(options['dtype']), options['head_dim'])
  assert has == expected


@pytest.mark.parametrize(
  'fused, has, expected',
  [(True, True, 'cudnn'), (True, False, 'xla'), (False, True, 'xla')],
)
def test_cudnn_is_taken_where_it_may(fused, has, expected, monkeypatch):
  asked = mock.Mock(return_value='result')
  monkeypatch.setattr(attention, '_has_cudnn', lambda *_: has)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', asked)
  inputs = _inputs()
  assert attention.softmax_attention(*inputs, fused=fused) == 'result'
  asked.assert_called_once_with(*inputs, implementation=expected)
