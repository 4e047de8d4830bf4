"""Tests of the gates against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from ds_jax import nn
from ds_jax.nn import gate as nn_gate

WIDTH, REDUCED, BUCKETS = 12, 3, 4


def make_gate(num_buckets=BUCKETS, **options):
  """A gate of random parameters, and the parameters."""
  return randomize(
    nn.DoubleHeadedGate(WIDTH, num_buckets, rngs=nnx.Rngs(0), **options)
  )


def randomize(gate):
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


@pytest.mark.parametrize('side', [1, 7, 56])
def test_mean_of_pixels(side):
  # A mean of 3, so that sums are large beside what they are of.
  x = np.random.default_rng(side).normal(3, 1, (2, side, side, 5))
  x = x.astype(np.float32)
  # Some 60 roundings of 2 ** -24, of a running sum of 3136 numbers.
  found = jax.jit(nn_gate.mean_of_pixels)(x)
  np.testing.assert_allclose(found, np.float64(x).mean((1, 2)), rtol=4e-6)


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

  @parameterized.parameters(1, 8, 12)
  def test_attention_of_one_plus_tanh_equals_its_formula(self, width):
    gate, params = make_gate(activation='one_plus_tanh')
    x = make_input(width)
    kernel, bias = params['expand']['kernel'], params['expand']['bias']
    logits = reduced(x, params) @ kernel[:, :width] + bias[:width]
    expected = x * (1 + np.tanh(logits[:, None, None]))
    found = gate.attention(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_attention_of_one_plus_tanh_starts_as_the_identity(self):
    gate = nn.DoubleHeadedGate(
      WIDTH, activation='one_plus_tanh', rngs=nnx.Rngs(0)
    )
    for dtype in (jnp.float32, jnp.bfloat16):
      x = jnp.asarray(make_input(8), dtype)
      np.testing.assert_array_equal(gate.attention(x), x)

    # It can leave the identity: the reduction is not zero.
    graph, params = nnx.split(gate)

    def loss(params):
      return (nnx.merge(graph, params).attention(make_input(WIDTH)) ** 2).sum()

    gradient = jax.grad(loss)(params)
    assert np.asarray(gradient['expand']['kernel'][...]).any()

  def test_attention_of_the_sigmoid_starts_with_a_kernel(self):
    gate = nn.DoubleHeadedGate(WIDTH, rngs=nnx.Rngs(0))
    assert np.asarray(gate.expand.kernel[...]).all()

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


def assert_close(found, expected, tolerance=1e-5):
  """To the largest magnitude: float32 sums of some tens of terms."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def pool(x, pooling):
  """The statistics of x (N, positions, C) that a slimming gate reads."""
  x = x.astype(np.float64)
  mean, deviation = x.mean(1), np.sqrt(x.var(1) + 1e-6)
  if pooling == 'mean':
    return mean
  return np.concatenate([mean, x.max(1), deviation], axis=1)


def make_slimming_gate(pooling, hidden=(6, 5)):
  """A gate of random parameters and statistics, and both as arrays."""
  gate, params = randomize(
    nn.SlimmingGate(
      WIDTH, BUCKETS, hidden=hidden, pooling=pooling, rngs=nnx.Rngs(0)
    )
  )
  # A variance is positive.
  params['norm']['variance'] = np.exp(params['norm']['variance'])
  gate.norm.variance[...] = jnp.asarray(params['norm']['variance'])
  return gate, params


def normalized(x, params, mean=None, variance=None):
  """A batch norm, with its running statistics unless others are given."""
  norm = params['norm']
  mean = norm['mean'][0] if mean is None else mean
  variance = norm['variance'][0] if variance is None else variance
  deviation = np.sqrt(np.asarray(variance, np.float64) + 1e-5)
  return (x - mean) / deviation * norm['scale'] + norm['bias']


def perceptron(x, params):
  for _, layer in sorted(params['hidden'].items()):
    x = np.maximum(x @ layer['kernel'] + layer['bias'], 0)
  return x @ params['head']['kernel']


def slimming_logits(x, params, pooling):
  return perceptron(normalized(pool(x, pooling), params), params)


class SlimmingGateTest(parameterized.TestCase):
  @parameterized.product(
    pooling=('mean', 'mean_max_std'), hidden=((6, 5), (7,), (4, 5, 6))
  )
  def test_logits_of_tokens_equal_their_formula(self, pooling, hidden):
    gate, params = make_slimming_gate(pooling, hidden)
    assert len(params['hidden']) == len(hidden)
    x = make_input(WIDTH).reshape(5, 6, WIDTH)
    expected = slimming_logits(x, params, pooling)
    assert expected.shape == (5, BUCKETS) and (expected != 0).all()
    assert_close(gate(x), expected)

  @parameterized.parameters('mean', 'mean_max_std')
  def test_without_hidden_layers_the_head_is_linear(self, pooling):
    gate, params = make_slimming_gate(pooling, hidden=())
    x = make_input(WIDTH).reshape(5, 6, WIDTH)
    assert params.keys() == {'norm', 'head'}
    expected = normalized(pool(x, pooling), params) @ params['head']['kernel']
    assert_close(gate(x), expected)

  @parameterized.parameters('mean', 'mean_max_std')
  def test_pixels_are_pooled_like_tokens(self, pooling):
    gate, _ = make_slimming_gate(pooling)
    x = make_input(WIDTH)
    np.testing.assert_array_equal(gate(x), gate(x.reshape(5, 6, WIDTH)))

  def test_order_of_tokens_does_not_matter(self):
    gate, _ = make_slimming_gate('mean_max_std')
    x = make_input(WIDTH).reshape(5, 6, WIDTH)
    assert_close(gate(x[:, [3, 1, 5, 0, 2, 4]]), gate(x))

  @parameterized.parameters(('mean', 12), ('mean_max_std', 36))
  def test_arrays_are_the_norm_the_layers_and_the_head(self, pooling, inputs):
    _, params = make_slimming_gate(pooling)
    shapes = jax.tree.map(np.shape, params)
    affine = {'scale': (inputs,), 'bias': (inputs,)}
    statistics = {'mean': (1, inputs), 'variance': (1, inputs)}
    assert shapes == {
      'norm': {**affine, **statistics},
      'hidden': {
        0: {'kernel': (inputs, 6), 'bias': (6,)},
        1: {'kernel': (6, 5), 'bias': (5,)},
      },
      'head': {'kernel': (5, BUCKETS)},
    }

  @parameterized.parameters('mean', 'mean_max_std')
  def test_momentum_moves_the_statistics_and_uses_the_batch_s(self, pooling):
    gate, params = make_slimming_gate(pooling)
    x = make_input(WIDTH).reshape(5, 6, WIDTH)
    pooled = pool(x, pooling)
    found = gate(x, momentum=0.25)
    batch = pooled.mean(0), pooled.var(0, ddof=1)
    for kind, moment in zip(('mean', 'variance'), batch, strict=True):
      expected = 0.75 * params['norm'][kind] + 0.25 * moment[None]
      assert_close(getattr(gate.norm, kind)[...], expected)
    by_batch = normalized(pooled, params, pooled.mean(0), pooled.var(0))
    # The batch's variance is small in places: its rounding counts tenfold.
    assert_close(found, perceptron(by_batch, params), 1e-4)

  def test_without_momentum_the_statistics_stay(self):
    gate, params = make_slimming_gate('mean_max_std')
    gate(make_input(WIDTH))
    for kind in ('mean', 'variance'):
      found = getattr(gate.norm, kind)[...]
      np.testing.assert_array_equal(found, params['norm'][kind])

  def test_fresh_gate_prefers_no_bucket_and_can_learn(self):
    gate = nn.SlimmingGate(
      WIDTH, BUCKETS, hidden=(6, 5), pooling='mean_max_std', rngs=nnx.Rngs(0)
    )
    assert (np.asarray(gate(make_input(WIDTH))) == 0).all()
    graph, params, statistics = nnx.split(gate, nnx.Param, nnx.BatchStat)

    def loss(params):
      merged = nnx.merge(graph, params, statistics)
      return merged(make_input(WIDTH))[:, 0].sum()

    gradient = jax.grad(loss)(params)
    assert np.asarray(gradient['head']['kernel'][...])[:, 0].any()

  def test_features_that_do_not_vary_have_a_finite_gradient(self):
    gate, params = make_slimming_gate('mean_max_std')
    x = np.ones((2, 6, WIDTH), np.float32)
    assert_close(gate(x), slimming_logits(x, params, 'mean_max_std'))
    gradient = jax.grad(lambda x: gate(x).sum())(x)
    assert np.isfinite(gradient).all() and gradient.any()

  def test_bfloat16_features_give_float32_logits(self):
    gate, params = make_slimming_gate('mean_max_std')
    x = jnp.asarray(make_input(WIDTH).reshape(5, 6, WIDTH), jnp.bfloat16)
    logits = gate(x)
    assert logits.dtype == jnp.float32
    assert_close(logits, slimming_logits(np.asarray(x), params, 'mean_max_std'))

  def test_other_widths_are_refused(self):
    gate, _ = make_slimming_gate('mean_max_std')
    with pytest.raises(ValueError, match='Slice of 39 channels, row 0, does n'):
      gate(make_input(13))

  def test_other_options_are_refused(self):
    with pytest.raises(ValueError, match="gate_pooling='max': expected 'mean'"):
      make_slimming_gate('max')
    with pytest.raises(ValueError, match='gate_hidden=0: expected at least 1'):
      make_slimming_gate('mean', hidden=(6, 0))
