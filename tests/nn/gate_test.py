"""Tests of the double-headed gate against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from ds_jax import nn

WIDTH, REDUCED, BUCKETS = 12, 3, 4


def make_gate(num_buckets=BUCKETS):
  """A gate of random parameters, and the parameters."""
  gate = nn.DoubleHeadedGate(WIDTH, num_buckets, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  graph, params = nnx.split(gate)
  params = jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
  )
  arrays = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
  return nnx.merge(graph, params), arrays


def make_input(width):
  x = np.random.default_rng(1).normal(size=(5, 3, 2, width))
  return x.astype(np.float32)


def reduced(x, params):
  """r = relu(mean(x) @ W1[:c] + b1)."""
  kernel, bias = params['reduce']['kernel'], params['reduce']['bias']
  pooled = x.astype(np.float64).mean((1, 2))
  return np.maximum(pooled @ kernel[: x.shape[-1]] + bias, 0)


class DoubleHeadedGateTest(parameterized.TestCase):
  @parameterized.parameters(1, 8, 12)
  def test_attention_equals_its_formula(self, width):
    gate, params = make_gate()
    x = make_input(width)
    kernel, bias = params['expand']['kernel'], params['expand']['bias']
    logits = reduced(x, params) @ kernel[:, :width] + bias[:width]
    expected = x / (1 + np.exp(-logits[:, None, None]))
    found = gate.attention(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(1, 8, 12)
  def test_logits_equal_their_formula(self, width):
    gate, params = make_gate()
    x = make_input(width)
    expected = reduced(x, params) @ params['slim']['kernel']
    assert expected.shape == (5, BUCKETS) and (expected != 0).any()
    np.testing.assert_allclose(gate.logits(x), expected, rtol=1e-5, atol=1e-6)

  def test_reduction_is_a_quarter_of_the_full_width(self):
    gate, params = make_gate()
    assert gate.reduced(make_input(8)).shape == (5, REDUCED)
    assert params['reduce']['kernel'].shape == (WIDTH, REDUCED)
    assert params['slim'].keys() == {'kernel'}

  def test_fresh_gate_prefers_no_bucket(self):
    gate = nn.DoubleHeadedGate(WIDTH, BUCKETS, rngs=nnx.Rngs(0))
    assert (np.asarray(gate.logits(make_input(WIDTH))) == 0).all()

  def test_without_buckets_there_is_no_slimming_head(self):
    gate, params = make_gate(num_buckets=None)
    assert gate.slim is None and params.keys() == {'reduce', 'expand'}

  def test_bfloat16_features_give_float32_logits(self):
    gate, params = make_gate()
    x = jnp.asarray(make_input(8), jnp.bfloat16)
    logits = gate.logits(x)
    assert logits.dtype == jnp.float32
    expected = reduced(np.asarray(x), params) @ params['slim']['kernel']
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert gate.attention(x).dtype == jnp.bfloat16
