"""Tests of DS-MobileNet: each slice is the fixed network of that width.

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

OPTIONS = dict(
  stem_widths=(6, 8),
  stages=(
    dict(widths=(8, 12)),
    dict(widths=(8, 12, 16), depth=2, stride=2),
    dict(widths=(12, 16, 24), stride=2),
  ),
  gate_stage=1,
)
# DS-MobileNet++: the same with kernels.
KERNELS = ((3, 5), (3, 3, 5), (3, 5, 5))
OPTIONS_PP = dict(
  OPTIONS,
  stages=tuple(
    dict(stage, kernels=kernels)
    for stage, kernels in zip(OPTIONS['stages'], KERNELS, strict=True)
  ),
)
# Block name, its stride, and the (stage input, stage output) it sits between:
# 0 is the stem, 1 to 3 are the stages.
BLOCKS = (
  ('stages/0/0', 1, 0, 1),
  ('stages/1/0', 2, 1, 2),
  ('stages/1/1', 1, 2, 2),
  ('stages/2/0', 2, 2, 3),
)
STRIDES = tuple(block[:2] for block in BLOCKS)
# Name, widths of the stem and the stages, the blocks' kernels, and the rows of
# statistics in the trunk and in the branch. The second block's kernel is in the
# trunk, so it is the same in all buckets.
SUBNETS = (
  ('bucket_0', (6, 8, 8, 12), (3, 3, 3, 3), 0, 0),
  ('bucket_2', (6, 8, 16, 24), (3, 3, 5, 5), 0, 2),
  ('widest', (8, 12, 16, 24), (5, 5, 5, 5), 1, 3),
)
RELEASED = [
  133,
  153,
  175,
  200,
  226,
  255,
  286,
  319,
  355,
  393,
  433,
  475,
  519,
  565,
]


def create_abstract(num_classes=5, **options):
  """A model of shapes, made without compiling an initialiser."""
  return models.create_abstract_model('ds_mobilenet', num_classes, **options)


def param_slices(widths, kernels):
  """Where a sub-network's parameters lie in the supernet's."""
  slices = {
    'stem/kernel': np.s_[:, :, :, : widths[0]],
    'stem_norm/scale': np.s_[: widths[0]],
    'stem_norm/bias': np.s_[: widths[0]],
    'classifier/kernel': np.s_[: widths[3]],
    'classifier/bias': np.s_[:],
  }
  for (name, _, before, after), kernel in zip(BLOCKS, kernels, strict=True):
    width_in, width = widths[before], widths[after]
    centre = {3: np.s_[1:4], 5: np.s_[:]}[kernel]
    slices |= {
      f'{name}/depthwise/kernel': np.s_[centre, centre, :, :width_in],
      f'{name}/depthwise_norm/scale': np.s_[:width_in],
      f'{name}/depthwise_norm/bias': np.s_[:width_in],
      f'{name}/gate/reduce/kernel': np.s_[:width_in],
      f'{name}/gate/reduce/bias': np.s_[:],
      f'{name}/gate/expand/kernel': np.s_[:, :width_in],
      f'{name}/gate/expand/bias': np.s_[:width_in],
      f'{name}/pointwise/kernel': np.s_[:width_in, :width],
      f'{name}/pointwise_norm/scale': np.s_[:width],
      f'{name}/pointwise_norm/bias': np.s_[:width],
    }
  return slices


def stat_slices(widths, trunk_row, branch_row):
  """Where a sub-network's statistics lie in the supernet's."""
  rows = {
    'stem_norm': (trunk_row, widths[0]),
    'stages/0/0/depthwise_norm': (trunk_row, widths[0]),
    'stages/0/0/pointwise_norm': (trunk_row, widths[1]),
    'stages/1/0/depthwise_norm': (trunk_row, widths[1]),
    'stages/1/0/pointwise_norm': (branch_row, widths[2]),
    'stages/1/1/depthwise_norm': (branch_row, widths[2]),
    'stages/1/1/pointwise_norm': (branch_row, widths[2]),
    'stages/2/0/depthwise_norm': (branch_row, widths[2]),
    'stages/2/0/pointwise_norm': (branch_row, widths[3]),
  }
  return {
    f'{norm}/{kind}': np.s_[row, :width]
    for norm, (row, width) in rows.items()
    for kind in ('mean', 'variance')
  }


def swish(x):
  return x / (1 + jnp.exp(-x))


def fixed_attention(x, name, params):
  reduced = fixed.dense(x.mean((1, 2)), f'{name}/reduce', params)
  logits = fixed.dense(jnp.maximum(reduced, 0), f'{name}/expand', params)
  return x / (1 + jnp.exp(-logits))[:, None, None, :]


def fixed_network(params, stats, images, blocks):
  """A MobileNet of one width; `blocks` holds the names and strides."""
  x = fixed.convolve(images, params['stem/kernel'], 2)
  x = swish(fixed.batch_norm(x, 'stem_norm', params, stats))
  for name, stride in blocks:
    kernel = params[f'{name}/depthwise/kernel']
    x = fixed.convolve(x, kernel, stride, x.shape[-1])
    x = swish(fixed.batch_norm(x, f'{name}/depthwise_norm', params, stats))
    x = fixed_attention(x, f'{name}/gate', params)
    x = fixed.convolve(x, params[f'{name}/pointwise/kernel'][None, None], 1)
    x = swish(fixed.batch_norm(x, f'{name}/pointwise_norm', params, stats))
  return fixed.dense(x.mean((1, 2)), 'classifier', params)


class SubnetTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_abstract(**OPTIONS_PP)
    rng = np.random.default_rng(1)
    cls.images = rng.normal(size=(4, 15, 12, 3)).astype(np.float32)
    cls.comparison = fixed.Comparison(cls.model, fixed_network, cls.images)
    cls.variables = cls.comparison.variables
    cls.architecture = cls.comparison.architecture
    cls.subnets = {
      name: cls.model.sub_networks[index] for name, *_, index in SUBNETS
    }

  # Same sums in another order, through 9 norms: a few float32 roundings
  # (6e-8), which the batch's own statistics make some tens of times larger.
  @parameterized.named_parameters((s[0], *s) for s in SUBNETS)
  def test_slice_equals_the_fixed_network(
    self, name, widths, kernels, trunk_row, branch_row
  ):
    for momentum, tolerance in ((None, 1e-5), (0.1, 1e-4)):
      self.comparison.assert_equal(
        self.subnets[name],
        STRIDES,
        param_slices(widths, kernels),
        stat_slices(widths, trunk_row, branch_row),
        momentum=momentum,
        tolerance=tolerance,
        has_gradient=momentum is not None or name == 'bucket_1',
      )

  @parameterized.named_parameters((s[0], *s[:3]) for s in SUBNETS)
  def test_cost_is_that_of_the_fixed_network(self, name, widths, kernels):
    subnet = self.subnets[name]
    assert subnet.widths == widths
    slices, rows = param_slices(widths, kernels), stat_slices(widths, 0, 0)
    for size in (28, 32, 33, 224):
      self.comparison.assert_cost(subnet, STRIDES, slices, rows, size)

  def test_costs_in_parts_are_those_of_the_trunk_and_the_rest(self):
    def trunk(stem, width, kernel):
      # The stem and a block in 16 x 16 pixels, whose attention has two units,
      # and the next block's depthwise convolution in 8 x 8.
      madds = 256 * 27 * stem
      madds += 256 * (kernel**2 * stem + stem + stem * width) + 2 * 2 * stem
      return madds + 64 * kernel**2 * width

    fixed.assert_parts_make_the_cost(
      self.model, 32, (trunk(6, 8, 3), trunk(8, 12, 5))
    )

  @parameterized.parameters('bucket_2', 'widest')
  def test_trunk_and_branch_compose_to_the_call(self, name):
    subnet = self.subnets[name]

    @functools.partial(jax.jit, static_argnums=1)
    def run(variables, in_parts):
      model = self.architecture.bind(variables)
      if in_parts:
        features = model.trunk(self.images, subnet, momentum=0.1)
        logits = model.branch(features, subnet, momentum=0.1)
      else:
        logits = model(self.images, subnet, momentum=0.1)
      return logits, models.variables_of(model).batch_stats

    whole, parts = (run(self.variables, in_parts) for in_parts in (0, 1))
    for one, other in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
      np.testing.assert_array_equal(one, other)

  def test_trunk_is_the_same_for_all_buckets(self):
    trunk = jax.jit(
      lambda variables, subnet: self.architecture.bind(variables).trunk(
        self.images, subnet
      ),
      static_argnums=1,
    )
    default = trunk(self.variables, None)
    assert default.shape == (4, 4, 3, 8)
    for bucket in self.model.routing_space:
      np.testing.assert_array_equal(trunk(self.variables, bucket), default)
    assert trunk(self.variables, self.model.widest).shape == (4, 4, 3, 12)

  def test_gate_logits_equal_their_formula(self):
    params, stats = self.variables.params, self.variables.batch_stats
    name, widths = 'stages/1/0/gate', SUBNETS[0][1]
    features = self.architecture.bind(self.variables).trunk(self.images)
    found = self.architecture.bind(self.variables).gate_logits(features)
    kernel = params[f'{name}/reduce/kernel'][: widths[1]]
    pooled = np.asarray(features, np.float64).mean((1, 2))
    reduced = np.maximum(pooled @ kernel + params[f'{name}/reduce/bias'], 0)
    expected = reduced @ params[f'{name}/slim/kernel']
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert stats and expected.any()


class OptionsTest(parameterized.TestCase):
  @parameterized.parameters(((), 'head'), ((5, 7), 'hidden/0'))
  def test_an_own_gate_reads_the_trunk_and_changes_nothing_else(
    self, hidden, first
  ):
    shared = create_abstract(**OPTIONS)
    own = create_abstract(**OPTIONS, gate_head='own', gate_hidden=hidden)
    before, after = (models.variables_of(m).params for m in (shared, own))
    added = after.keys() - before.keys()
    assert before.keys() - after.keys() == {'stages/1/0/gate/slim/kernel'}
    assert all(models.is_slimming(path) for path in added)
    assert after[f'slim/{first}/kernel'].shape[0] == 3 * 8
    assert after['slim/head/kernel'].shape[1] == 3
    before, after = (models.variables_of(m).batch_stats for m in (shared, own))
    added = after.keys() - before.keys()
    assert added == {'slim/norm/mean', 'slim/norm/variance'}
    assert before.keys() <= after.keys()
    for subnet in (*own.routing_space, own.widest):
      assert own.cost(subnet, 32) == shared.cost(subnet, 32)

  def test_own_gate_logits_equal_their_formula(self):
    own = create_abstract(**OPTIONS, gate_head='own', gate_hidden=(5, 7))
    variables = fixed.random_variables(own)
    model = models.Architecture(own).bind(variables)
    images = np.random.default_rng(1).normal(size=(4, 15, 12, 3))
    features = model.trunk(images.astype(np.float32))
    expected = fixed.slimming_logits(features, variables)
    assert expected.shape == (4, 3) and expected.any()
    np.testing.assert_allclose(
      model.gate_logits(features), expected, rtol=1e-5, atol=1e-5
    )

  def test_other_gates_are_refused(self):
    with pytest.raises(ValueError, match="gate_head.*'shared' or 'own'"):
      create_abstract(**OPTIONS, gate_head='none')
    with pytest.raises(ValueError, match='gate_hidden=-1: expected at least 1'):
      create_abstract(**OPTIONS, gate_head='own', gate_hidden=(-1,))

  def test_widest_is_the_last_bucket_where_the_trunk_has_one_width(self):
    stages = (dict(widths=(12,)), *OPTIONS['stages'][1:])
    model = create_abstract(stem_widths=(8,), stages=stages, gate_stage=1)
    assert model.widest == model.routing_space[-1]
    assert [s.index for s in model.routing_space] == [0, 1, 2]
    assert [s.widths for s in model.routing_space] == [
      (8, 12, 8, 12),
      (8, 12, 12, 16),
      (8, 12, 16, 24),
    ]
    stats = models.variables_of(model).batch_stats
    assert stats['stem_norm/mean'].shape == (1, 8)
    assert stats['stages/2/0/pointwise_norm/mean'].shape == (3, 24)

  def test_slices_may_repeat_and_one_entry_is_for_all_buckets(self):
    stages = (
      dict(widths=(8, 8, 12), kernels=(3, 5, 5)),
      dict(widths=(12,), kernels=(3, 3, 3)),
    )
    model = create_abstract(stem_widths=(8,), stages=stages, gate_stage=0)
    found = [
      [(stage.width, stage.kernel) for stage in subnet.stages]
      for subnet in model.routing_space
    ]
    assert found == [
      [(8, 3), (12, 3)],
      [(8, 5), (12, 3)],
      [(12, 5), (12, 3)],
    ]

  def test_widest_stands_apart_where_the_gated_kernel_grows(self):
    # No bucket has the gated block's full kernel, which is in the trunk.
    stage = dict(widths=(8, 12), kernels=(3, 5))
    model = create_abstract(stem_widths=(8,), stages=[stage], gate_stage=0)
    assert model.widest.index == 2
    assert model.widest.stages == model.routing_space[1].stages
    last, widest = (model.cost(s, 8).madds for s in model.sub_networks[1:])
    # 16 more taps of 8 channels in 4 x 4 pixels.
    assert widest - last == 16 * 8 * 16

  def test_subnets_are_values(self):
    one, other = (create_abstract(seed=s, **OPTIONS) for s in (0, 1))
    assert one.narrowest == other.narrowest == one.routing_space[0]
    assert len({*one.routing_space, *other.routing_space, one.widest}) == 4
    assert one.sub_networks == (*one.routing_space, one.widest)

  def test_bfloat16_activations_give_float32_logits_of_float32_weights(self):
    full, half = (
      create_abstract(dtype=dtype, **OPTIONS)
      for dtype in ('float32', 'bfloat16')
    )
    variables = fixed.random_variables(full)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    logits = [
      jax.jit(
        lambda variables, model=model: models.Architecture(model).bind(
          variables
        )(jnp.asarray(images, jnp.float32), model.widest)
      )(variables)
      for model in (full, half)
    ]
    assert logits[1].dtype == jnp.float32
    params = models.variables_of(half).params
    assert {p.dtype for p in params.values()} == {jnp.dtype('float32')}
    # 8 bits through nine convolutions, and not the same to the bit.
    scale = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.1 * scale

  def test_dropout_drops_features_with_a_key_and_keeps_their_mean(self):
    model = create_abstract(dropout_rate=0.25, **OPTIONS)
    architecture = models.Architecture(model)
    variables = fixed.random_variables(model)
    # Logits are linear in the dropped features.
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 3))
    features = jax.jit(
      lambda images: architecture.bind(variables).trunk(images)
    )(images.astype(np.float32))
    branch = jax.jit(
      lambda features, key: architecture.bind(variables).branch(
        features, model.narrowest, rng=key
      )
    )
    many = branch(jnp.repeat(features, 4096, axis=0), jax.random.key(0))
    plain = branch(features, None)
    # 12 features, each kept or not: some are seen many times over.
    assert 100 < len(np.unique(np.asarray(many)[:, 0].round(5))) <= 2**12
    error = np.asarray(many).std(0) / np.sqrt(4096)
    assert (np.abs(np.asarray(many).mean(0) - plain[0]) < 5 * error).all()

  def test_released_network_costs_what_was_published(self):
    model = models.create_abstract_model('ds_mobilenet')
    madds = [model.cost(s, 224).madds for s in model.routing_space]
    assert [round(m / 1e6) for m in madds] == RELEASED
    assert round(model.cost(model.widest, 224).madds / 1e6) == 820
    assert model.narrowest.widths == (16, 32, 48, 96, 224, 736)
    assert model.routing_space[-1].widths == (16, 32, 48, 96, 640, 1152)
    assert model.widest.widths == (24, 88, 168, 264, 640, 1152)
    total = sum(
      array.size
      for path, array in models.variables_of(model).params.items()
      if 'slim' not in path
    )
    assert model.cost(model.widest, 224).params == total

  def test_weights_depend_on_the_seed_alone(self):
    one, same, other = (
      models.variables_of(
        ds_jax.create_model(
          'ds_mobilenet',
          5,
          seed=seed,
          stem_widths=(8,),
          stages=(dict(widths=(8, 12)),),
          gate_stage=0,
        )
      ).params
      for seed in (3, 3, 4)
    )
    for path, array in one.items():
      np.testing.assert_array_equal(array, same[path])
      if path.endswith('kernel') and 'slim' not in path:
        assert (array != other[path]).any(), path

  def test_models_are_listed(self):
    assert ds_jax.list_models() == sorted(ds_jax.list_models())
    assert {'ds_mobilenet', 'ds_mobilenet_tiny'} <= {*ds_jax.list_models()}


class RefusalTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('decreasing', dict(widths=(8, 4)), r'list width=\(8, 4\): .*narrowest'),
    ('none', dict(widths=()), r'list width=\(\): expected one or more'),
    ('zero', dict(widths=(0, 8)), r'list width=\(0, 8\): .*positive numbers'),
    ('kernels', dict(widths=(8,), kernels=(5, 3)), r'list kernel=\(5, 3\): '),
    ('even', dict(widths=(8,), kernels=(3, 4)), r'\(3, 4\) must be odd'),
    ('depth', dict(widths=(8,), depth=0), 'depth >= 1 and stride 1 or 2'),
    ('stride', dict(widths=(8,), stride=3), 'depth >= 1 and stride 1 or 2'),
  )
  def test_bad_stages_are_refused(self, stage, message):
    with pytest.raises(ValueError, match=message):
      models.StageSpec(**stage)

  def create(self, **options):
    return create_abstract(**{**OPTIONS, **options})

  @parameterized.named_parameters(
    ('widths', dict(widths=(12, 16))),
    ('kernels', dict(widths=(8, 12, 16), kernels=(3, 5))),
  )
  def test_stages_of_unequal_numbers_of_buckets_are_refused(self, stage):
    message = r'one entry a bucket.*stage 1: width=\(8, 12, 16\), .*stage 2: '
    with pytest.raises(ValueError, match=message):
      self.create(stages=(*OPTIONS['stages'][:2], stage))

  def test_lists_of_one_entry_alone_are_refused(self):
    with pytest.raises(ValueError, match=r'stage 0: width=\(8,\), kernel=\(3,'):
      create_abstract(stem_widths=(8,), stages=[dict(widths=[8])], gate_stage=0)

  def test_buckets_that_are_alike_are_refused(self):
    stages = (dict(widths=(8, 8, 12)), dict(widths=(8, 8, 16)))
    with pytest.raises(ValueError, match='Two of these 3 buckets are alike'):
      self.create(stages=stages, gate_stage=0)

  @parameterized.parameters(-1, 3)
  def test_gate_outside_the_stages_is_refused(self, gate_stage):
    message = f'gate_stage={gate_stage} is not one of the 3 stages'
    with pytest.raises(ValueError, match=message):
      self.create(gate_stage=gate_stage)

  def test_unknown_model_names_those_there_are(self):
    with pytest.raises(ValueError, match="'resnet'.*ds_mobilenet, ds_mob"):
      ds_jax.create_model('resnet')

  def test_unknown_option_is_named(self):
    with pytest.raises(
      ValueError, match="'depths' of .*'ds_mobilenet'; .*gate_"
    ):
      self.create(depths=3)

  @parameterized.named_parameters(
    ('channels_first', (2, 3, 8, 8), np.float32, 'expected .N, H, W, 3., NHWC'),
    ('grey', (2, 8, 8, 1), np.float32, 'expected .N, H, W, 3., NHWC'),
    ('one_image', (8, 8, 3), np.float32, 'expected .N, H, W, 3., NHWC'),
    ('integers', (2, 8, 8, 3), np.uint8, 'dtype uint8: expected normalised'),
  )
  def test_other_images_are_refused(self, shape, dtype, message):
    model = self.create()
    with pytest.raises(ValueError, match=message):
      model(np.zeros(shape, dtype), model.narrowest)
