"""Tests of DS-ResNet: each slice is the fixed network of that size.

The fixed network below is written anew in plain JAX. It reads its sizes off its
weights, which are copied out of the supernet's with slices written by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import ds_jax
import fixed
from ds_jax import models

# For large images: 7 x 7 and a pool; the trunk has slices of its own.
OPTIONS = dict(
  stem=dict(widths=(4, 6)),
  stages=(
    dict(widths=(8, 12), inner=(4, 8), depths=(1, 2)),
    dict(widths=(8, 8, 12), inner=(4, 8, 8), depths=(1, 2, 2), stride=2),
    dict(widths=(12, 16, 16), inner=(4, 6, 8), depths=(1,), stride=2),
  ),
  gate_stage=1,
)
# For small images, and the gate right after the stem.
SMALL_OPTIONS = dict(
  stem=dict(widths=(4, 6), kernel_size=3, stride=1, pool=False),
  stages=(dict(widths=(8, 12), inner=(4, 8), depths=(1, 2), stride=2),),
  gate_stage=0,
)
# Name, the stem's width, the blocks that run, and the rows of statistics in the
# trunk and in the branch. A block is its name, its stride, and its channels
# before, inside and after.
SUBNETS = (
  (
    'bucket_0',
    4,
    (
      ('stages/0/0', 1, 4, 4, 8),
      ('stages/1/0', 2, 8, 4, 8),
      ('stages/2/0', 2, 8, 4, 12),
    ),
    (0, 0),
  ),
  (
    'bucket_1',
    4,
    (
      ('stages/0/0', 1, 4, 4, 8),
      ('stages/1/0', 2, 8, 8, 8),
      ('stages/1/1', 1, 8, 8, 8),
      ('stages/2/0', 2, 8, 6, 16),
    ),
    (0, 1),
  ),
  (
    'bucket_2',
    4,
    (
      ('stages/0/0', 1, 4, 4, 8),
      ('stages/1/0', 2, 8, 8, 12),
      ('stages/1/1', 1, 12, 8, 12),
      ('stages/2/0', 2, 12, 8, 16),
    ),
    (0, 2),
  ),
  (
    'widest',
    6,
    (
      ('stages/0/0', 1, 6, 8, 12),
      ('stages/0/1', 1, 12, 8, 12),
      ('stages/1/0', 2, 12, 8, 12),
      ('stages/1/1', 1, 12, 8, 12),
      ('stages/2/0', 2, 12, 8, 16),
    ),
    (1, 3),
  ),
)
SMALL_SUBNETS = (
  ('bucket_0', 4, (('stages/0/0', 2, 4, 4, 8),), (0, 0)),
  (
    'bucket_1',
    4,
    (('stages/0/0', 2, 4, 8, 12), ('stages/0/1', 1, 12, 8, 12)),
    (0, 1),
  ),
  (
    'widest',
    6,
    (('stages/0/0', 2, 6, 8, 12), ('stages/0/1', 1, 12, 8, 12)),
    (1, 2),
  ),
)


def create_abstract(num_classes=5, **options):
  """A model of shapes, made without compiling an initialiser."""
  return models.create_abstract_model('ds_resnet50', num_classes, **options)


def param_slices(stem, blocks):
  """Where a sub-network's parameters lie in the supernet's."""
  slices = {
    'stem/kernel': np.s_[:, :, :, :stem],
    'stem_norm/scale': np.s_[:stem],
    'stem_norm/bias': np.s_[:stem],
    'classifier/kernel': np.s_[: blocks[-1][-1]],
    'classifier/bias': np.s_[:],
  }
  for name, _, before, inner, after in blocks:
    slices |= {
      f'{name}/reduce/kernel': np.s_[:, :, :before, :inner],
      f'{name}/spatial/kernel': np.s_[:, :, :inner, :inner],
      f'{name}/gate/reduce/kernel': np.s_[:inner],
      f'{name}/gate/reduce/bias': np.s_[:],
      f'{name}/gate/expand/kernel': np.s_[:, :inner],
      f'{name}/gate/expand/bias': np.s_[:inner],
      f'{name}/expand/kernel': np.s_[:, :, :inner, :after],
    }
    if name.endswith('/0'):
      slices[f'{name}/projection/kernel'] = np.s_[:, :, :before, :after]
    for norm, width in norms(name, inner, after):
      slices |= {
        f'{norm}/scale': np.s_[:width],
        f'{norm}/bias': np.s_[:width],
      }
  return slices


def norms(name, inner, after):
  """A block's norms and their widths."""
  widths = {'reduce': inner, 'spatial': inner, 'expand': after}
  if name.endswith('/0'):
    widths['projection'] = after
  return [(f'{name}/{layer}_norm', width) for layer, width in widths.items()]


def stat_slices(stem, blocks, rows, gate_stage=1):
  """Where a sub-network's statistics lie in the supernet's."""
  trunk = [f'stages/{i}/' for i in range(gate_stage)]
  places = {'stem_norm': (rows[0], stem)}
  for name, _, _, inner, after in blocks:
    row = rows[0] if name.startswith(tuple(trunk)) else rows[1]
    places |= {norm: (row, width) for norm, width in norms(name, inner, after)}
  return {
    f'{norm}/{kind}': np.s_[row, :width]
    for norm, (row, width) in places.items()
    for kind in ('mean', 'variance')
  }


def strides(blocks):
  return tuple(block[:2] for block in blocks)


def relu(x):
  return jnp.maximum(x, 0)


def max_pool(x):
  """The largest of the 3 x 3 pixels around every other one."""
  height, width = (-(-side // 2) for side in x.shape[1:3])
  padding = ((0, 0), (1, 1), (1, 1), (0, 0))
  padded = jnp.pad(x, padding, constant_values=-jnp.inf)
  shifted = [
    padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
    for i in range(3)
    for j in range(3)
  ]
  return functools.reduce(jnp.maximum, shifted)


def fixed_attention(x, name, params):
  reduced = relu(fixed.dense(x.mean((1, 2)), f'{name}/reduce', params))
  scale = 1 + jnp.tanh(fixed.dense(reduced, f'{name}/expand', params))
  return x * scale[:, None, None, :]


def fixed_network(params, stats, images, blocks, stem_stride=2, pool=True):
  """A ResNet of one size; `blocks` holds the names and strides."""

  def layer(x, name, stride=1):
    x = fixed.convolve(x, params[f'{name}/kernel'], stride)
    return fixed.batch_norm(x, f'{name}_norm', params, stats)

  x = relu(layer(images, 'stem', stem_stride))
  x = max_pool(x) if pool else x
  for name, stride in blocks:
    y = relu(layer(x, f'{name}/reduce'))
    y = relu(layer(y, f'{name}/spatial', stride))
    y = layer(fixed_attention(y, f'{name}/gate', params), f'{name}/expand')
    if f'{name}/projection/kernel' in params:
      x = layer(x, f'{name}/projection', stride)
    x = relu(x + y)
  return fixed.dense(x.mean((1, 2)), 'classifier', params)


def named_subnets(model, table):
  subnets = (*model.routing_space, model.widest)
  return dict(zip([name for name, *_ in table], subnets, strict=True))


class SubnetTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_abstract(**OPTIONS)
    rng = np.random.default_rng(1)
    cls.images = rng.normal(size=(4, 19, 16, 3)).astype(np.float32)
    # With this seed no array is behind dead ReLUs alone.
    cls.comparison = fixed.Comparison(
      cls.model, fixed_network, cls.images, seed=1
    )
    cls.variables = cls.comparison.variables
    cls.architecture = cls.comparison.architecture
    cls.subnets = named_subnets(cls.model, SUBNETS)

  # Same sums in another order, through as many as 17 norms: a few float32
  # roundings (6e-8), which the batch's own statistics, of as few as 8 values,
  # make some tens of times larger.
  @parameterized.named_parameters((s[0], *s) for s in SUBNETS)
  def test_slice_equals_the_fixed_network(self, name, stem, blocks, rows):
    for momentum, tolerance in ((None, 1e-5), (0.1, 1e-4)):
      self.comparison.assert_equal(
        self.subnets[name],
        strides(blocks),
        param_slices(stem, blocks),
        stat_slices(stem, blocks, rows),
        momentum=momentum,
        tolerance=tolerance,
        has_gradient=momentum is not None or name == 'bucket_1',
      )

  @parameterized.named_parameters((s[0], *s) for s in SUBNETS)
  def test_cost_is_that_of_the_fixed_network(self, name, stem, blocks, rows):
    subnet = self.subnets[name]
    slices = param_slices(stem, blocks)
    stats = stat_slices(stem, blocks, rows)
    for size in (32, 37, 224):
      self.comparison.assert_cost(subnet, strides(blocks), slices, stats, size)

  def test_costs_in_parts_are_those_of_the_trunk_and_the_rest(self):
    def block(before, inner, after, projects):
      # In 8 x 8 pixels, with an attention of two units.
      kernels = before * inner + 9 * inner**2 + inner * after
      kernels += before * after if projects else 0
      return 64 * kernels + 64 * inner + 2 * 2 * inner

    stem = 16**2 * 7**2 * 3
    bucket = stem * 4 + block(4, 4, 8, True)
    widest = stem * 6 + block(6, 8, 12, True) + block(12, 8, 12, False)
    fixed.assert_parts_make_the_cost(self.model, 32, (bucket, widest))

  def test_trunk_is_the_same_for_all_buckets(self):
    trunk = jax.jit(
      lambda variables, subnet: self.architecture.bind(variables).trunk(
        self.images, subnet
      ),
      static_argnums=1,
    )
    default = trunk(self.variables, None)
    assert default.shape == (4, 5, 4, 8)
    for bucket in self.model.routing_space:
      np.testing.assert_array_equal(trunk(self.variables, bucket), default)
    widest = jax.eval_shape(
      lambda variables: trunk(variables, self.model.widest), self.variables
    )
    assert widest.shape == (4, 5, 4, 12)

  def test_gate_logits_equal_their_formula(self):
    @jax.jit
    def run(variables):
      model = self.architecture.bind(variables)
      features = model.trunk(self.images)
      return features, model.gate_logits(features)

    features, found = run(self.variables)
    # As wide as the narrowest trunk, the only one that it sees.
    shapes = {
      path: array.shape
      for path, array in self.variables.params.items()
      if path.startswith('slim/')
    }
    assert shapes == {
      'slim/norm/scale': (24,),
      'slim/norm/bias': (24,),
      'slim/hidden/0/kernel': (24, 64),
      'slim/hidden/0/bias': (64,),
      'slim/hidden/1/kernel': (64, 64),
      'slim/hidden/1/bias': (64,),
      'slim/head/kernel': (64, 3),
    }
    expected = fixed.slimming_logits(features, self.variables)
    assert expected.shape == (4, 3) and expected.any()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class SmallImagesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_abstract(**SMALL_OPTIONS)
    rng = np.random.default_rng(1)
    cls.images = rng.normal(size=(4, 7, 6, 3)).astype(np.float32)
    network = functools.partial(fixed_network, stem_stride=1, pool=False)
    cls.comparison = fixed.Comparison(cls.model, network, cls.images)
    cls.subnets = named_subnets(cls.model, SMALL_SUBNETS)

  @parameterized.named_parameters((s[0], *s) for s in SMALL_SUBNETS)
  def test_slice_equals_the_fixed_network(self, name, stem, blocks, rows):
    for momentum, tolerance in ((None, 1e-5), (0.1, 1e-4)):
      self.comparison.assert_equal(
        self.subnets[name],
        strides(blocks),
        param_slices(stem, blocks),
        stat_slices(stem, blocks, rows, gate_stage=0),
        momentum=momentum,
        tolerance=tolerance,
        has_gradient=momentum is not None,
      )

  @parameterized.named_parameters((s[0], *s) for s in SMALL_SUBNETS)
  def test_cost_is_that_of_the_fixed_network(self, name, stem, blocks, rows):
    slices = param_slices(stem, blocks)
    stats = stat_slices(stem, blocks, rows, gate_stage=0)
    for size in (28, 33):
      self.comparison.assert_cost(
        self.subnets[name], strides(blocks), slices, stats, size
      )

  def test_trunk_of_a_gate_at_the_stem_costs_the_stem(self):
    stem = 28**2 * 3**2 * 3
    fixed.assert_parts_make_the_cost(
      self.comparison.model, 28, (stem * 4, stem * 6)
    )

  def test_trunk_and_branch_compose_to_the_call(self):
    subnet = self.subnets['bucket_1']

    @functools.partial(jax.jit, static_argnums=1)
    def run(variables, in_parts):
      model = self.comparison.architecture.bind(variables)
      if in_parts:
        features = model.trunk(self.images, subnet, momentum=0.1)
        logits = model.branch(features, subnet, momentum=0.1)
      else:
        logits = model(self.images, subnet, momentum=0.1)
      return logits, models.variables_of(model).batch_stats

    variables = self.comparison.variables
    whole, parts = (run(variables, in_parts) for in_parts in (0, 1))
    for one, other in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
      np.testing.assert_array_equal(one, other)

  def test_bfloat16_activations_give_float32_logits_of_float32_weights(self):
    half = create_abstract(dtype='bfloat16', **SMALL_OPTIONS)
    logits = [
      jax.jit(
        lambda variables, model=model: models.Architecture(model).bind(
          variables
        )(self.images, model.widest)
      )(self.comparison.variables)
      for model in (self.model, half)
    ]
    assert logits[1].dtype == jnp.float32
    params = models.variables_of(half).params
    assert {p.dtype for p in params.values()} == {jnp.dtype('float32')}
    # 8 bits through eight convolutions, and not the same to the bit.
    scale = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.1 * scale


class StartTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = ds_jax.create_model('ds_resnet50', 5, **SMALL_OPTIONS)
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 8))
    cls.x = x.astype(np.float32)

  def test_attention_starts_as_the_identity(self):
    for block in self.model.stages[0]:
      np.testing.assert_array_equal(block.gate.attention(self.x), self.x)
      assert np.asarray(block.gate.reduce.kernel[...]).all()

  def test_blocks_start_as_their_shortcut(self):
    params = models.variables_of(self.model).params
    for path, array in params.items():
      if path.endswith('scale'):
        expected = 0 if 'expand_norm' in path else 1
        assert (np.asarray(array) == expected).all(), path
    block, stage = self.model.stages[0][1], self.model.narrowest.stages[0]
    found = block(self.x, stage, 0)
    np.testing.assert_array_equal(found, np.maximum(self.x, 0))


class RefusalTest(parameterized.TestCase):
  def create(self, **options):
    return create_abstract(**{**OPTIONS, **options})

  @parameterized.named_parameters(
    ('widths', dict(widths=(12, 8)), r'list width=\(12, 8\): expected one or'),
    ('inner', dict(inner=(8, 4)), r'list inner=\(8, 4\): expected one or'),
    ('depths', dict(depths=(0, 2)), r'list depth=\(0, 2\): .*positive'),
    ('none', dict(inner=()), r'list inner=\(\): expected one or'),
    ('stride', dict(stride=3), 'needs stride 1 or 2, got 3'),
  )
  def test_bad_stages_are_refused(self, options, message):
    stage = dict(widths=(8, 12), inner=(4, 8), depths=(1, 2))
    with pytest.raises(ValueError, match=message):
      models.BottleneckStage(**{**stage, **options})

  def test_bad_stems_are_refused(self):
    with pytest.raises(ValueError, match=r'list width=\(6, 4\): expected one'):
      models.Stem((6, 4))

  def test_stages_of_unequal_numbers_of_buckets_are_refused(self):
    stages = (*OPTIONS['stages'][:2], dict(OPTIONS['stages'][2], depths=(1, 2)))
    message = r'one entry a bucket.*stage 2: width=.*, depth=\(1, 2\)'
    with pytest.raises(ValueError, match=message):
      self.create(stages=stages)

  def test_buckets_that_are_alike_are_refused(self):
    alike = dict(widths=(8, 8, 12), inner=(4, 4, 8), depths=(1, 1, 2))
    with pytest.raises(ValueError, match='Two of these 3 buckets are alike'):
      self.create(stages=(alike,), gate_stage=0)

  @parameterized.parameters(-1, 3)
  def test_gate_outside_the_stages_is_refused(self, gate_stage):
    message = f'gate_stage={gate_stage} is not one of the 3 stages'
    with pytest.raises(ValueError, match=message):
      self.create(gate_stage=gate_stage)

  def test_other_choices_are_refused(self):
    with pytest.raises(ValueError, match="gate_pooling='max': expected 'mean'"):
      self.create(gate_pooling='max')
    with pytest.raises(ValueError, match="dtype='float16': expected 'float32'"):
      self.create(dtype='float16')

  @parameterized.named_parameters(
    ('channels_first', (2, 3, 8, 8), np.float32, 'expected .N, H, W, 3., NHWC'),
    ('integers', (2, 8, 8, 3), np.uint8, 'dtype uint8: expected normalised'),
  )
  def test_other_images_are_refused(self, shape, dtype, message):
    model = self.create()
    with pytest.raises(ValueError, match=message):
      model(np.zeros(shape, dtype), model.narrowest)
