"""Tests of DS-ViT: each slice is the fixed network of that size.

The fixed network below is written anew in plain JAX. It reads its sizes off its
weights, which are copied out of the supernet's with slices written by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import fixed
from ds_jax import models
from ds_jax.models import vit

HEAD = 4
BASE = dict(
  image_size=8,
  patch_size=4,
  head_dim=HEAD,
  gate_stage=1,
  pooling='class_token',
)
# Stage 2 reads in buckets 0 and 1 what stage 1 left idle.
IDLE = dict(
  BASE,
  stages=(
    dict(widths=(8, 12), heads=(1, 2), hidden=(8, 12), depths=(1, 2)),
    dict(
      widths=(4, 8, 12), heads=(1, 1, 2), hidden=(4, 8, 8), depths=(1, 2, 2)
    ),
    dict(widths=(8, 12, 12), heads=(1, 2, 3), hidden=(6, 8, 12), depths=(1,)),
  ),
)
PLAIN = dict(
  BASE,
  slicing='plain',
  pooling='mean',
  stages=(
    dict(widths=(8, 12), heads=(2,), hidden=(8, 12), depths=(1,)),
    dict(widths=(6, 8, 8), heads=(1, 2, 2), hidden=(8,), depths=(1, 1, 2)),
    dict(widths=(4, 6, 8), heads=(1, 1, 2), hidden=(4, 8, 12), depths=(1,)),
  ),
)
OPTIONS = {'idle': IDLE, 'plain': PLAIN}
# Name, the embedding's width, the classifier's, and the blocks that run: name,
# active width, heads and hidden units.
IDLE_SUBNETS = (
  (
    'bucket_0',
    12,
    12,
    (
      ('stages/0/0', 8, 1, 8),
      ('stages/1/0', 4, 1, 4),
      ('stages/2/0', 8, 1, 6),
    ),
  ),
  (
    'bucket_1',
    12,
    12,
    (
      ('stages/0/0', 8, 1, 8),
      ('stages/1/0', 8, 1, 8),
      ('stages/1/1', 8, 1, 8),
      ('stages/2/0', 12, 2, 8),
    ),
  ),
  (
    'bucket_2',
    12,
    12,
    (
      ('stages/0/0', 8, 1, 8),
      ('stages/1/0', 12, 2, 8),
      ('stages/1/1', 12, 2, 8),
      ('stages/2/0', 12, 3, 12),
    ),
  ),
  (
    'widest',
    12,
    12,
    (
      ('stages/0/0', 12, 2, 12),
      ('stages/0/1', 12, 2, 12),
      ('stages/1/0', 12, 2, 8),
      ('stages/1/1', 12, 2, 8),
      ('stages/2/0', 12, 3, 12),
    ),
  ),
)
PLAIN_SUBNETS = (
  (
    'bucket_0',
    8,
    4,
    (
      ('stages/0/0', 8, 2, 8),
      ('stages/1/0', 6, 1, 8),
      ('stages/2/0', 4, 1, 4),
    ),
  ),
  (
    'bucket_1',
    8,
    6,
    (
      ('stages/0/0', 8, 2, 8),
      ('stages/1/0', 8, 2, 8),
      ('stages/2/0', 6, 1, 8),
    ),
  ),
  (
    'bucket_2',
    8,
    8,
    (
      ('stages/0/0', 8, 2, 8),
      ('stages/1/0', 8, 2, 8),
      ('stages/1/1', 8, 2, 8),
      ('stages/2/0', 8, 2, 12),
    ),
  ),
  (
    'widest',
    12,
    8,
    (
      ('stages/0/0', 12, 2, 12),
      ('stages/1/0', 8, 2, 8),
      ('stages/1/1', 8, 2, 8),
      ('stages/2/0', 8, 2, 12),
    ),
  ),
)

CASES = [
  (f'{slicing}_{name}', slicing, index, *rest)
  for slicing, table in (('idle', IDLE_SUBNETS), ('plain', PLAIN_SUBNETS))
  for index, (name, *rest) in enumerate(table)
]


def create_abstract(num_classes=5, **options):
  """A model of shapes, made without compiling an initialiser."""
  return models.create_abstract_model('ds_vit_cifar', num_classes, **options)


def param_slices(embedding, last, blocks, has_class_token):
  """Where a sub-network's parameters lie in the supernet's."""
  slices = {
    'patches/kernel': np.s_[:, :embedding],
    'patches/bias': np.s_[:embedding],
    'position': np.s_[:, :embedding],
    'norm/scale': np.s_[:last],
    'norm/bias': np.s_[:last],
    'classifier/kernel': np.s_[:last],
    'classifier/bias': np.s_[:],
  }
  if has_class_token:
    slices['class_token'] = np.s_[:embedding]
  for name, width, heads, hidden in blocks:
    values = heads * HEAD
    slices |= {
      f'{name}/attention_norm/scale': np.s_[:width],
      f'{name}/attention_norm/bias': np.s_[:width],
      f'{name}/query_key_value/kernel': np.s_[:width, : 3 * values],
      f'{name}/query_key_value/bias': np.s_[: 3 * values],
      f'{name}/project/kernel': np.s_[:values, :width],
      f'{name}/project/bias': np.s_[:width],
      f'{name}/mlp_norm/scale': np.s_[:width],
      f'{name}/mlp_norm/bias': np.s_[:width],
      f'{name}/expand/kernel': np.s_[:width, :hidden],
      f'{name}/expand/bias': np.s_[:hidden],
      f'{name}/reduce/kernel': np.s_[:hidden, :width],
      f'{name}/reduce/bias': np.s_[:width],
    }
  return slices


def layer_norm(x, name, params):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  scale, bias = (
    fixed.along_channels(params[f'{name}/{k}'], 3) for k in ('scale', 'bias')
  )
  return (x - mean) / jnp.sqrt(variance + 1e-6) * scale + bias


def fixed_attention(x, name, params):
  qkv = fixed.dense(x, f'{name}/query_key_value', params)
  # The columns are a query, a key and a value for each head in turn.
  heads = qkv.reshape(*x.shape[:2], -1, 3, HEAD)
  query, key, value = (heads[:, :, :, i] for i in range(3))
  weights = jnp.exp(jnp.einsum('nthc,nshc->nhts', query, key) / HEAD**0.5)
  weights /= weights.sum(-1, keepdims=True)
  y = jnp.einsum('nhts,nshc->nthc', weights, value)
  return fixed.dense(y.reshape(*x.shape[:2], -1), f'{name}/project', params)


def fixed_mlp(x, name, params):
  x = fixed.dense(x, f'{name}/expand', params)
  x = x * (1 + jax.scipy.special.erf(x / 2**0.5)) / 2
  return fixed.dense(x, f'{name}/reduce', params)


def fixed_embedding(images, params, patch_size=4):
  rows, columns = (range(0, side, patch_size) for side in images.shape[1:3])
  patches = [
    images[:, i : i + patch_size, j : j + patch_size].reshape(len(images), -1)
    for i in rows
    for j in columns
  ]
  x = fixed.dense(jnp.stack(patches, 1), 'patches', params)
  if 'class_token' in params:
    token = fixed.along_channels(params['class_token'], 3)
    token = jnp.tile(token, (len(images), 1, 1))
    x = jnp.concatenate([token, x], 1)
  return x + params['position'][None]


def fixed_network(params, stats, images, blocks, idles):
  """A ViT of one size; `blocks` holds the names."""
  assert not stats
  x = fixed_embedding(images, params)
  for name in blocks:
    width = params[f'{name}/mlp_norm/scale'].size
    idle = x[..., width : x.shape[-1] if idles else width]
    x = x[..., :width]
    y = layer_norm(x, f'{name}/attention_norm', params)
    x = x + fixed_attention(y, name, params)
    y = layer_norm(x, f'{name}/mlp_norm', params)
    x = jnp.concatenate([x + fixed_mlp(y, name, params), idle], -1)
  x = layer_norm(x, 'norm', params)
  x = x[:, 0] if 'class_token' in params else x.mean(1)
  return fixed.dense(x, 'classifier', params)


def make_images(count=4, size=8):
  images = np.random.default_rng(1).normal(size=(count, size, size, 3))
  return images.astype(np.float32)


def names_of(blocks):
  return tuple(block[0] for block in blocks)


def compare(slicing, image_size=8, **options):
  """Our network and the fixed one, and our sub-networks."""
  options = {**OPTIONS[slicing], 'image_size': image_size, **options}
  model = create_abstract(**options)
  network = functools.partial(fixed_network, idles=slicing == 'idle')
  images = make_images(size=image_size)
  subnets = (*model.routing_space, model.widest)
  return fixed.Comparison(model, network, images), subnets


class SlicingTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.compared = {slicing: compare(slicing) for slicing in OPTIONS}

  # Same sums in another order, through as many as 11 norms: float32 roundings.
  @parameterized.named_parameters(*CASES)
  def test_slice_equals_the_fixed_network(
    self, slicing, index, embedding, last, blocks
  ):
    comparison, subnets = self.compared[slicing]
    slices = param_slices(embedding, last, blocks, slicing == 'idle')
    # Without statistics, inference and training are the same.
    comparison.assert_equal(subnets[index], names_of(blocks), slices, rows={})

  @parameterized.named_parameters(*CASES)
  def test_cost_is_that_of_the_fixed_network(
    self, slicing, index, embedding, last, blocks
  ):
    slices = param_slices(embedding, last, blocks, slicing == 'idle')
    for size in (8, 20):
      comparison, subnets = compare(slicing, size)
      subnet = subnets[index]
      comparison.assert_cost(subnet, names_of(blocks), slices, {}, size)

  def test_costs_in_parts_are_those_of_the_trunk_and_the_rest(self):
    def block(tokens, width, heads, hidden):
      dense = width * 3 * heads * HEAD + heads * HEAD * width
      dense += 2 * width * hidden
      return tokens * dense + 2 * tokens**2 * heads * HEAD

    # Four patches of 48 numbers, and in the first model a class token.
    fixed.assert_parts_make_the_cost(
      self.compared['idle'][0].model,
      8,
      (
        4 * 48 * 12 + block(5, 8, 1, 8),
        4 * 48 * 12 + 2 * block(5, 12, 2, 12),
      ),
    )
    fixed.assert_parts_make_the_cost(
      self.compared['plain'][0].model,
      8,
      (4 * 48 * 8 + block(4, 8, 2, 8), 4 * 48 * 12 + block(4, 12, 2, 12)),
    )

  @parameterized.named_parameters(CASES[0], CASES[4])
  def test_slicing_goes_with_the_other_pooling(
    self, slicing, index, embedding, last, blocks
  ):
    pooling = {'idle': 'mean', 'plain': 'class_token'}[slicing]
    comparison, subnets = compare(slicing, pooling=pooling)
    slices = param_slices(embedding, last, blocks, slicing == 'plain')
    names = names_of(blocks)
    comparison.assert_equal(
      subnets[index], names, slices, rows={}, has_gradient=False
    )
    comparison.assert_cost(subnets[index], names, slices, {}, 8)

  def test_trunk_and_branch_compose_to_the_call(self):
    comparison, subnets = self.compared['idle']

    @functools.partial(jax.jit, static_argnums=1)
    def run(variables, in_parts):
      model = comparison.architecture.bind(variables)
      if not in_parts:
        return model(comparison.images, subnets[1])
      features = model.trunk(comparison.images, subnets[1])
      return model.branch(features, subnets[1])

    whole, parts = (run(comparison.variables, in_parts) for in_parts in (0, 1))
    np.testing.assert_array_equal(whole, parts)

  @parameterized.parameters(('idle', 5, 12), ('plain', 4, 8))
  def test_gate_logits_equal_their_formula(self, slicing, tokens, width):
    comparison, subnets = self.compared[slicing]

    @jax.jit
    def run(variables):
      model = comparison.architecture.bind(variables)
      features = [model.trunk(comparison.images, s) for s in (None, *subnets)]
      return features[:4], model.gate_logits(features[0])

    (features, *others), found = run(comparison.variables)
    assert features.shape == (4, tokens, width)
    for other in others:
      np.testing.assert_array_equal(other, features)
    # As wide as the narrowest trunk, the only one that it sees.
    params = comparison.variables.params
    assert params['slim/hidden/0/kernel'].shape == (3 * width, 64)
    expected = fixed.slimming_logits(features, comparison.variables)
    assert expected.shape == (4, 3) and expected.any()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def test_bfloat16_activations_give_float32_logits_of_float32_weights(self):
    comparison, subnets = self.compared['idle']
    half = create_abstract(dtype='bfloat16', **IDLE)
    logits = [
      jax.jit(
        lambda variables, model=model: models.Architecture(model).bind(
          variables
        )(comparison.images, subnets[0])
      )(comparison.variables)
      for model in (comparison.model, half)
    ]
    assert logits[1].dtype == jnp.float32
    params = models.variables_of(half).params
    assert {p.dtype for p in params.values()} == {jnp.dtype('float32')}
    # 8 bits through three blocks, and not the same to the bit.
    scale = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.05 * scale


class IdleChannelsTest(parameterized.TestCase):
  """One set of weights, and trunks that end after 0, 1 and 2 stages."""

  stages = (
    dict(widths=(4,), heads=(1,), hidden=(4,), depths=(2,)),
    dict(widths=(8,), heads=(1,), hidden=(4,), depths=(1,)),
    dict(widths=(8, 12), heads=(1, 2), hidden=(4, 8), depths=(1,)),
  )

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    options = [
      dict(BASE, stages=cls.stages, gate_stage=gate_stage)
      for gate_stage in range(3)
    ]
    cls.models = [create_abstract(**o) for o in options]
    cls.variables = fixed.random_variables(cls.models[0])
    cls.images = make_images(count=2)

  def trunks(self, variables):
    """The embedding, after the narrow stage, and after the wider one."""
    # Not jitted, so that what two of them share is the same to the bit.
    return [
      np.asarray(models.Architecture(m).bind(variables).trunk(self.images))
      for m in self.models
    ]

  def test_idle_channels_pass_a_narrow_stage_to_the_bit(self):
    embedding, narrow, wide = self.trunks(self.variables)
    assert embedding.shape == narrow.shape == wide.shape == (2, 5, 12)
    np.testing.assert_array_equal(narrow[..., 4:], embedding[..., 4:])
    np.testing.assert_array_equal(wide[..., 8:], narrow[..., 8:])
    assert (narrow[..., :4] != embedding[..., :4]).all()
    assert (wide[..., :8] != narrow[..., :8]).all()

  def test_idle_channels_are_read_by_a_later_wider_stage_alone(self):
    params = dict(self.variables.params)
    position = params['position'].copy()
    position[:, 4:8] += np.random.default_rng(2).normal(size=(5, 4))
    other = self.variables.replace(params=params | {'position': position})
    _, narrow, wide = self.trunks(self.variables)
    _, other_narrow, other_wide = self.trunks(other)
    np.testing.assert_array_equal(other_narrow[..., :4], narrow[..., :4])
    assert (other_narrow[..., 4:8] != narrow[..., 4:8]).all()
    assert (other_wide[..., :4] != wide[..., :4]).all()
    np.testing.assert_array_equal(other_wide[..., 8:], wide[..., 8:])


class StochasticDepthTest(parameterized.TestCase):
  def test_each_update_of_each_sample_is_dropped_or_scaled(self):
    block = vit.Block(
      8, 2, 8, head_dim=HEAD, drop_rate=0.25, fused_attention=False,
      rngs=nnx.Rngs(0),
    )  # fmt: skip
    stage = models.StageSlice(width=8, heads=2, hidden=8)
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    found = block(np.repeat(x, 400, axis=0), stage, jax.random.key(0))
    outcomes = []
    for first in (0, 1 / 0.75):
      middle = x + first * block.attention(x, 2)
      outcomes += [middle + f * block.mlp(middle, 8) for f in (0, 1 / 0.75)]
    # Each sample as a whole is one of four; a batch rounds otherwise.
    distances = np.stack([np.abs(found - y).max((1, 2)) for y in outcomes])
    assert (distances.min(0) < 1e-5).all()
    assert (np.sort(distances, 0)[1] > 1e-2).all()
    counts = np.bincount(distances.argmin(0), minlength=4)
    chances = np.array([1, 3, 3, 9]) / 16
    deviations = np.sqrt(400 * chances * (1 - chances))
    assert (np.abs(counts - 400 * chances) < 4 * deviations).all()

  def make_marked(self, **options):
    """A model whose every update adds one to a channel of its own."""
    stages = (
      dict(widths=(10,), heads=(1,), hidden=(4,), depths=(3,)),
      dict(widths=(10,), heads=(1,), hidden=(4,), depths=(1,)),
      dict(widths=(10,), heads=(1,), hidden=(2, 4), depths=(1,)),
    )
    options = {**BASE, 'stages': stages, 'gate_stage': 2, **options}
    model = create_abstract(**options)
    variables = fixed.random_variables(model)
    params = dict(variables.params)
    blocks = [*(f'stages/0/{j}' for j in range(3)), 'stages/1/0', 'stages/2/0']
    updates = [f'{b}/{n}' for b in blocks for n in ('project', 'reduce')]
    for channel, name in enumerate(updates):
      params[f'{name}/kernel'] = np.zeros_like(params[f'{name}/kernel'])
      params[f'{name}/bias'] = np.eye(10, dtype=np.float32)[channel]
    return model, variables.replace(params=params)

  def assert_share(self, kept, keep):
    """A share of many is as likely as 1 in 10,000, at the least."""
    error = np.sqrt(keep * (1 - keep) / len(kept))
    assert abs(kept.mean() - keep) <= 4 * error

  def test_rate_rises_from_zero_at_the_first_block(self):
    model, variables = self.make_marked(drop_path_rate=0.4)
    images = np.zeros((4096, 8, 8, 3), np.float32)
    trunk = jax.jit(
      lambda images, rng: (
        models.Architecture(model).bind(variables).trunk(images, rng=rng)
      )
    )
    dropped = trunk(images, jax.random.key(0))
    # Without a key every update adds one.
    added = np.asarray(dropped - trunk(images[:1], None)) + 1
    for token in range(1, 5):
      np.testing.assert_allclose(added[:, token], added[:, 0], atol=1e-5)
    # The branch's block, the last, has yet to run.
    np.testing.assert_allclose(added[:, 0, 8:], 1, atol=1e-6)
    for channel, keep in enumerate([1, 1, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7]):
      values = added[:, 0, channel]
      kept = values > 0.5
      np.testing.assert_allclose(values, kept / keep, atol=1e-5)
      self.assert_share(kept, keep)
    # A block's two updates, and two blocks, are dropped independently.
    kept = added[:, 0, 2:8] > 0.5
    assert np.abs(np.corrcoef(kept.T) - np.eye(6)).max() < 4 / 4096**0.5

  def test_last_block_has_the_full_rate(self):
    model, variables = self.make_marked(drop_path_rate=0.4)
    features = np.random.default_rng(0).normal(size=(1, 5, 10))
    features = features.astype(np.float32)

    @jax.jit
    def branch(params, features, rng):
      bound = models.Architecture(model).bind(variables.replace(params=params))
      return bound.branch(features, model.narrowest, rng=rng)

    many = np.repeat(features, 4096, axis=0)
    found = branch(variables.params, many, jax.random.key(0))
    # The four outcomes, as weights that add nothing or more.
    chances = {}
    for first in (0, 1):
      for second in (0, 1):
        params = dict(variables.params)
        params['stages/2/0/project/bias'] = first / 0.6 * np.eye(10)[8]
        params['stages/2/0/reduce/bias'] = second / 0.6 * np.eye(10)[9]
        params = {k: np.float32(v) for k, v in params.items()}
        logits = branch(params, features, None)
        matches = np.abs(found - logits).max(1) < 1e-4
        chances[first, second] = np.asarray(matches)
    assert sum(c.sum() for c in chances.values()) == 4096
    for (first, second), matches in chances.items():
      self.assert_share(matches, (0.4, 0.6)[first] * (0.4, 0.6)[second])

  def test_without_a_rate_a_key_changes_nothing(self):
    model, variables = self.make_marked()
    images = make_images()
    bound = models.Architecture(model).bind(variables)
    plain = bound(images, model.widest)
    np.testing.assert_array_equal(
      bound(images, model.widest, rng=jax.random.key(0)), plain
    )


class OptionsTest(parameterized.TestCase):
  def test_widest_is_the_last_bucket_where_the_trunk_has_one_slice(self):
    stages = (
      dict(widths=(12,), heads=(2,), hidden=(12,), depths=(2,)),
      dict(widths=(4, 12), heads=(1, 2), hidden=(8,), depths=(1,)),
    )
    model = create_abstract(**{**BASE, 'stages': stages})
    assert model.widest == model.routing_space[-1]
    assert [s.widths for s in model.routing_space] == [(12, 12, 4), (12,) * 3]

  def test_only_the_gate_has_batch_statistics(self):
    stats = models.variables_of(create_abstract(**IDLE)).batch_stats
    assert {path: array.shape for path, array in stats.items()} == {
      'slim/norm/mean': (1, 36),
      'slim/norm/variance': (1, 36),
    }

  @parameterized.parameters(('idle', (16, 16, 4)), ('plain', (16, 16, 4)))
  def test_the_embedding_is_as_wide_as_the_widest_slice(self, slicing, widths):
    stages = (
      dict(widths=(16,), heads=(1,), hidden=(4,), depths=(1,)),
      dict(widths=(4, 8), heads=(1,), hidden=(4,), depths=(1,)),
    )
    model = create_abstract(**{**BASE, 'stages': stages, 'slicing': slicing})
    assert model.narrowest.widths == widths
    params = models.variables_of(model).params
    assert params['position'].shape == (5, 16)
    trunk = nnx.eval_shape(lambda m, x: m.trunk(x), model, make_images())
    assert trunk.shape == (4, 5, 16)


class RefusalTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('widths', dict(widths=(12, 8)), r'list width=\(12, 8\): expected one or'),
    ('heads', dict(heads=(2, 1)), r'list heads=\(2, 1\): expected one or'),
    ('hidden', dict(hidden=(0, 4)), r'list hidden=\(0, 4\): .*positive'),
    ('depths', dict(depths=()), r'list depth=\(\): expected one or'),
  )
  def test_bad_stages_are_refused(self, options, message):
    stage = dict(widths=(8, 12), heads=(1,), hidden=(4,), depths=(1,))
    with pytest.raises(ValueError, match=message):
      models.BlockStage(**{**stage, **options})

  @parameterized.named_parameters(
    ('slicing', dict(slicing='masked'), "slicing='masked': expected 'idle' or"),
    ('pooling', dict(pooling='max'), "pooling='max': expected 'class_token'"),
    ('patches', dict(image_size=10), 'image_size=10 is no multiple of patch_s'),
    ('gate', dict(gate_stage=3), 'gate_stage=3 is not one of the 3 stages'),
    ('gate_pooling', dict(gate_pooling='max'), "gate_pooling='max': expected"),
    ('dropout', dict(dropout_rate=1.0), 'dropout_rate=1.0: .* less than 1'),
    ('drop', dict(drop_path_rate=1.0), 'drop_path_rate=1.0: .* less than 1'),
    ('patch', dict(patch_size=0), 'patch_size=0: expected at least 1'),
    ('head', dict(head_dim=0), 'head_dim=0: expected at least 1'),
    ('dtype', dict(dtype='float16'), "dtype='float16': expected 'float32' or"),
  )
  def test_bad_options_are_refused(self, options, message):
    with pytest.raises(ValueError, match=message):
      create_abstract(**{**IDLE, **options})

  @parameterized.named_parameters(
    ('in_the_branch', IDLE['stages'], 1, r'0 has the widths \[8, 8, 4, 8\]'),
    # Its embedding is in the trunk, as narrow as the narrowest.
    ('after_the_stem', PLAIN['stages'][1:], 0, r'\[6, 8, 6\]'),
    # In no bucket.
    ('in_the_widest', [*PLAIN['stages'][:1], *PLAIN['stages']], 2, '3 has'),
  )
  def test_plain_slicing_refuses_to_widen_again(self, stages, gate, message):
    if gate == 2:
      stages[0] = dict(stages[0], widths=(8,))
    options = {**BASE, 'slicing': 'plain', 'stages': stages, 'gate_stage': gate}
    with pytest.raises(ValueError, match=f'Plain slicing cannot.*{message}'):
      create_abstract(**options)

  @parameterized.parameters((8, 12), (12, 12), (4, 4))
  def test_images_of_another_size_are_refused(self, height, width):
    model = create_abstract(**IDLE)
    message = f'Images of {height} x {width} pixels: .* made for 8 x 8; see'
    with pytest.raises(ValueError, match=message):
      model(np.zeros((2, height, width, 3), np.float32), model.narrowest)

  def test_cost_of_images_of_another_size_is_refused(self):
    model = create_abstract(**IDLE)
    with pytest.raises(ValueError, match='image_size=16, but .* of 8 pixels'):
      model.cost(model.narrowest, 16)
