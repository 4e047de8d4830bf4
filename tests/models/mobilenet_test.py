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
# Block name, its stride, and the (stage input, stage output) it sits between:
# 0 is the stem, 1 to 3 are the stages.
BLOCKS = (
  ('stages/0/0', 1, 0, 1),
  ('stages/1/0', 2, 1, 2),
  ('stages/1/1', 1, 2, 2),
  ('stages/2/0', 2, 2, 3),
)
# Name, widths of the stem and the stages, and the rows of statistics in the
# trunk and in the branch.
SUBNETS = (
  ('bucket_0', (6, 8, 8, 12), 0, 0),
  ('bucket_1', (6, 8, 12, 16), 0, 1),
  ('bucket_2', (6, 8, 16, 24), 0, 2),
  ('widest', (8, 12, 16, 24), 1, 3),
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


def random_variables(model, seed=0):
  """Weights and statistics of which no two are alike."""
  rng = np.random.default_rng(seed)

  def fill(path, array):
    if path.endswith(('scale', 'variance')):
      return rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
    if path.endswith('reduce/bias'):  # Past the ReLU, for a gradient.
      return rng.uniform(1, 2, array.shape).astype(np.float32)
    if path.endswith(('bias', 'mean')):
      return rng.normal(0, 0.3, array.shape).astype(np.float32)
    fan_in = max(np.prod(array.shape[:-1]), 1)
    return rng.normal(0, fan_in**-0.5, array.shape).astype(np.float32)

  variables = models.variables_of(model)
  return models.Variables(
    {path: fill(path, array) for path, array in variables.params.items()},
    {path: fill(path, array) for path, array in variables.batch_stats.items()},
  )


def param_slices(widths):
  """Where a sub-network's parameters lie in the supernet's."""
  slices = {
    'stem/kernel': np.s_[:, :, :, : widths[0]],
    'stem_norm/scale': np.s_[: widths[0]],
    'stem_norm/bias': np.s_[: widths[0]],
    'classifier/kernel': np.s_[: widths[3]],
    'classifier/bias': np.s_[:],
  }
  for name, _, before, after in BLOCKS:
    width_in, width = widths[before], widths[after]
    slices |= {
      f'{name}/depthwise/kernel': np.s_[:, :, :, :width_in],
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


def cut(arrays, slices):
  return {path: np.array(arrays[path][index]) for path, index in slices.items()}


def convolve(x, kernel, stride, groups=1):
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def along_channels(vector):
  return vector.reshape(1, 1, 1, -1)


def fixed_norm(x, name, params, stats):
  """`stats=None` normalises with the batch's own."""
  if stats is None:
    mean = x.mean((0, 1, 2))
    variance = ((x - along_channels(mean)) ** 2).mean((0, 1, 2))
  else:
    mean, variance = stats[f'{name}/mean'], stats[f'{name}/variance']
  mean, deviation = (
    along_channels(v) for v in (mean, jnp.sqrt(variance + 1e-5))
  )
  scale, bias = (
    along_channels(params[f'{name}/{k}']) for k in ('scale', 'bias')
  )
  return (x - mean) / deviation * scale + bias


def swish(x):
  return x / (1 + jnp.exp(-x))


def fixed_attention(x, name, params):
  def layer(name, x):
    return x @ params[f'{name}/kernel'] + params[f'{name}/bias'].reshape(1, -1)

  reduced = jnp.maximum(layer(f'{name}/reduce', x.mean((1, 2))), 0)
  scale = 1 / (1 + jnp.exp(-layer(f'{name}/expand', reduced)))
  return x * scale[:, None, None, :]


def fixed_network(params, stats, images, blocks):
  """A MobileNet of one width; `blocks` holds the names and strides."""
  x = convolve(images, params['stem/kernel'], 2)
  x = swish(fixed_norm(x, 'stem_norm', params, stats))
  for name, stride in blocks:
    x = convolve(x, params[f'{name}/depthwise/kernel'], stride, x.shape[-1])
    x = swish(fixed_norm(x, f'{name}/depthwise_norm', params, stats))
    x = fixed_attention(x, f'{name}/gate', params)
    x = convolve(x, params[f'{name}/pointwise/kernel'][None, None], 1)
    x = swish(fixed_norm(x, f'{name}/pointwise_norm', params, stats))
  x = x.mean((1, 2)) @ params['classifier/kernel']
  return x + params['classifier/bias'].reshape(1, -1)


def count_madds(function, *args):
  """Multiply-adds in a program: convolutions, products, spatial means."""
  total = 0
  equations = list(jax.make_jaxpr(function)(*args).eqns)
  while equations:
    equation = equations.pop()
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        equations += value.jaxpr.eqns
    operands = [v.aval.shape for v in equation.invars]
    outputs = equation.outvars[0].aval.size
    if equation.primitive.name == 'conv_general_dilated':
      # HWIO, where I is already the inputs of one group.
      total += outputs * np.prod(operands[1][:3])
    elif equation.primitive.name == 'dot_general':
      ((contracted, _), _) = equation.params['dimension_numbers']
      total += outputs * np.prod([operands[0][i] for i in contracted])
    elif equation.primitive.name == 'reduce_sum':
      assert equation.params['axes'] == (1, 2) and len(operands[0]) == 4
      total += np.prod(operands[0])
  return int(total)


def assert_close(found, expected, tolerance):
  """Compares to each array's largest magnitude."""
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    scale = np.abs(value).max()
    assert np.abs(found[path] - value).max() <= tolerance * scale, path


class SubnetTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_abstract(**OPTIONS)
    cls.variables = random_variables(cls.model)
    cls.architecture = models.Architecture(cls.model)
    cls.subnets = dict(
      zip(
        [name for name, *_ in SUBNETS],
        (*cls.model.routing_space, cls.model.widest),
        strict=True,
      )
    )
    rng = np.random.default_rng(1)
    cls.images = rng.normal(size=(4, 15, 12, 3)).astype(np.float32)
    cls.weight = rng.normal(size=(4, 5)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=(0, 3, 4))
  def ours(self, params, stats, subnet, momentum):
    """Logits, statistics after, and the gradient of a mix of the logits."""

    def forward(params):
      model = self.architecture.bind(models.Variables(params, stats))
      logits = model(self.images, subnet, momentum=momentum)
      after = models.variables_of(model).batch_stats
      return (logits * self.weight).sum(), (logits, after)

    gradient, (logits, after) = jax.grad(forward, has_aux=True)(params)
    return logits, after, gradient

  @functools.partial(jax.jit, static_argnums=0)
  def fixed(self, params, stats):
    blocks = [block[:2] for block in BLOCKS]

    def forward(params):
      logits = fixed_network(params, stats, self.images, blocks)
      return (logits * self.weight).sum(), logits

    gradient, logits = jax.grad(forward, has_aux=True)(params)
    return logits, gradient

  # Same sums in another order, through 9 norms: a few float32 roundings
  # (6e-8), which the batch's own statistics make some tens of times larger.
  @parameterized.named_parameters(
    *(
      (f'{name}_{mode}', name, *rest, momentum, tolerance)
      for name, *rest in SUBNETS
      for mode, momentum, tolerance in (
        ('inference', None, 3e-5),
        ('training', 0.1, 1e-4),
      )
    )
  )
  def test_slice_equals_the_fixed_network(
    self, name, widths, trunk_row, branch_row, momentum, tolerance
  ):
    variables = self.variables
    logits, after, gradient = self.ours(
      variables.params, variables.batch_stats, self.subnets[name], momentum
    )
    slices = param_slices(widths)
    rows = stat_slices(widths, trunk_row, branch_row)
    stats = cut(variables.batch_stats, rows) if momentum is None else None
    expected = self.fixed(cut(variables.params, slices), stats)
    assert_close({'logits': logits}, {'logits': expected[0]}, tolerance)
    assert_close(cut(gradient, slices), expected[1], tolerance)
    assert all(np.asarray(array).any() for array in expected[1].values())

    outside = {path: np.array(array) for path, array in gradient.items()}
    for path, index in slices.items():
      outside[path][index] = 0
    assert not any(array.any() for array in outside.values())

    # The statistics that moved are those of this sub-network's rows.
    for path, array in after.items():
      moved = np.asarray(array) != variables.batch_stats[path]
      expected_moved = np.zeros(array.shape, bool)
      expected_moved[rows[path]] = momentum is not None
      np.testing.assert_array_equal(moved, expected_moved, path)

  @parameterized.named_parameters(*(s[:2] for s in SUBNETS))
  def test_cost_is_that_of_the_fixed_network(self, widths):
    name = self._testMethodName.removeprefix(
      'test_cost_is_that_of_the_fixed_network_'
    )
    subnet = self.subnets[name]
    assert subnet.widths == widths
    params = cut(self.variables.params, param_slices(widths))
    rows = stat_slices(widths, 0, 0)
    stats = cut(self.variables.batch_stats, rows)
    blocks = [block[:2] for block in BLOCKS]
    for size in (28, 32, 33, 224):
      images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
      madds = count_madds(
        lambda images: fixed_network(params, stats, images, blocks), images
      )
      cost = self.model.cost(subnet, size)
      assert cost.madds == madds
      assert cost.params == sum(array.size for array in params.values())
      assert isinstance(cost.madds, int) and isinstance(cost.params, int)

  @parameterized.parameters('bucket_1', 'widest')
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

  def test_subnets_are_values(self):
    one, other = (create_abstract(seed=s, **OPTIONS) for s in (0, 1))
    assert one.narrowest == other.narrowest == one.routing_space[0]
    assert len({*one.routing_space, *other.routing_space, one.widest}) == 4
    assert models.sub_networks(one) == (*one.routing_space, one.widest)

  def test_bfloat16_activations_give_float32_logits_of_float32_weights(self):
    full, half = (
      create_abstract(dtype=dtype, **OPTIONS)
      for dtype in ('float32', 'bfloat16')
    )
    variables = random_variables(full)
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
    variables = random_variables(model)
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
    ('decreasing', dict(widths=(8, 4)), 'must be one or more, strictly'),
    ('repeated', dict(widths=(8, 8)), 'must be one or more, strictly'),
    ('none', dict(widths=()), 'must be one or more, strictly'),
    ('depth', dict(widths=(8,), depth=0), 'depth >= 1 and stride 1 or 2'),
    ('stride', dict(widths=(8,), stride=3), 'depth >= 1 and stride 1 or 2'),
  )
  def test_bad_stages_are_refused(self, stage, message):
    with pytest.raises(ValueError, match=message):
      models.StageSpec(**stage)

  def create(self, **options):
    return create_abstract(**{**OPTIONS, **options})

  def test_stages_of_unequal_numbers_of_buckets_are_refused(self):
    stages = (*OPTIONS['stages'][:2], dict(widths=(12, 16)))
    with pytest.raises(ValueError, match='Stage 2 has 2 widths.* needs 3, one'):
      self.create(stages=stages)

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
