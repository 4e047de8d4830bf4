"""Tests of sorting channels: the widest network stays, slices change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import plain
from ds_jax import config, convert, models

SEPARABLE = dict(
  stem_widths=(4, 8),
  stages=(
    dict(widths=(4, 8), kernels=(3, 5)),
    dict(widths=(4, 8, 12), depth=2, stride=2),
  ),
  gate_stage=1,
)
# A first stage narrower than the rest, whose channels must stay together.
NARROW_FIRST = dict(
  plain.VIT,
  stages=(
    dict(widths=(8,), heads=(2,), hidden=(16,), depths=(2,)),
    dict(widths=(4, 12), heads=(1, 3), hidden=(8, 20), depths=(1, 2)),
  ),
)
PLAIN_SLICES = dict(
  plain.VIT,
  slicing='plain',
  pooling='mean',
  stages=(
    dict(widths=(8, 12), heads=(2, 3), hidden=(16,), depths=(1,)),
    dict(widths=(4, 8), heads=(1, 2), hidden=(8, 16), depths=(1, 2)),
  ),
)
LINEAR_GATE = dict(plain.VIT, gate_hidden=(), gate_pooling='mean')
OWN_GATE = dict(
  SEPARABLE,
  stem_widths=(8,),
  stages=(dict(widths=(8,), kernels=(3, 5)), SEPARABLE['stages'][1]),
  gate_head='own',
)
GATE_AT_THE_STEM = dict(plain.RESNET, gate_stage=0, gate_pooling='mean')
GATE_AT_THE_STEM['stem'] = dict(widths=(8,))
GATE_AT_THE_STEM['stages'] = (
  dict(widths=(8, 16), inner=(4, 6), depths=(1,)),
  dict(widths=(12, 24), inner=(4, 8), depths=(1, 2), stride=2),
)
MODELS = {
  'mobilenet': ('ds_mobilenet', SEPARABLE),
  'mobilenet_own_gate': ('ds_mobilenet', OWN_GATE),
  'resnet': ('ds_resnet50', plain.RESNET),
  'resnet_gate_at_the_stem': ('ds_resnet50', GATE_AT_THE_STEM),
  'vit': ('ds_vit_s16', plain.VIT),
  'vit_linear_gate': ('ds_vit_s16', LINEAR_GATE),
  'vit_narrow_first': ('ds_vit_s16', NARROW_FIRST),
  'vit_plain_slices': ('ds_vit_s16', PLAIN_SLICES),
}

READS_ALL = [
  'mobilenet',
  'mobilenet_own_gate',
  'resnet_gate_at_the_stem',
  'vit',
  'vit_linear_gate',
  'vit_narrow_first',
]
IMAGES = np.random.default_rng(1).normal(size=(4, 16, 16, 3))
IMAGES = IMAGES.astype(np.float32)


@functools.cache
def create_model(name):
  """A model with random weights."""
  family, options = MODELS[name]
  return plain.random_model(family, 5, **options)


@functools.cache
def program(name):
  """A function of a model's arrays to what its ends and its gate say."""
  model = create_model(name)
  architecture = models.Architecture(model)

  @jax.jit
  def run(variables):
    bound = architecture.bind(variables)
    features = bound.trunk(IMAGES, model.widest)
    reads_all = name in READS_ALL
    return {
      'narrowest': bound(IMAGES, model.narrowest),
      'widest': bound.branch(features, model.widest),
      'gate': bound.gate_logits(features) if reads_all else jnp.zeros(1),
    }

  return run


def outputs(name, model):
  return jax.device_get(program(name)(models.variables_of(model)))


def arrays_of(model):
  variables = models.variables_of(model)
  return {**variables.params, **variables.batch_stats}


def kernel_sum(arrays, *layers):
  """Sums |weights| into each output channel."""
  kernels = [np.abs(arrays[f'{layer}/kernel']) for layer in layers]
  return sum(k.sum(tuple(range(k.ndim - 1))) for k in kernels)


def scale_sum(arrays, *norms):
  return sum(np.abs(arrays[f'{norm}/scale']) for norm in norms)


def assert_falling(scores):
  assert len(scores) > 1
  # Ties within the rounding of float32 sums.
  assert (np.diff(scores) <= 1e-5 * np.max(scores)).all(), scores


class SortChannelsTest(parameterized.TestCase):
  @parameterized.product(name=[*MODELS], by=config.IMPORTANCES)
  def test_only_narrow_networks_change(self, name, by):
    model = create_model(name)
    before = outputs(name, model)
    after = outputs(name, convert.sort_channels(model, by))
    error = {
      end: np.abs(after[end] - before[end]).max() / np.abs(before[end]).max()
      for end in ('narrowest', 'widest')
    }
    # The same sums in another order, in float32.
    assert error['widest'] < 1e-5
    assert error['narrowest'] > 1e-2

  @parameterized.product(name=READS_ALL, by=config.IMPORTANCES)
  def test_a_gate_that_reads_all_channels_decides_the_same(self, name, by):
    model = create_model(name)
    before = outputs(name, model)['gate']
    after = outputs(name, convert.sort_channels(model, by))['gate']
    assert np.abs(before).max() > 0.01
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()

  @parameterized.product(
    # The channels that the gate's first layer reads, how often over.
    case=(
      ('mobilenet_own_gate', 'stages/0/0/pointwise_norm', 'hidden/0', 3),
      ('vit', 'norm', 'hidden/0', 3),
      ('vit_linear_gate', 'norm', 'head', 1),
    ),
    by=config.IMPORTANCES,
  )
  def test_the_gate_s_norm_and_first_layer_follow_the_channels(self, case, by):
    name, norm, layer, repeats = case
    before = arrays_of(create_model(name))
    after = arrays_of(convert.sort_channels(create_model(name), by))
    # All scales are different numbers.
    old, new = (np.asarray(a[f'{norm}/scale']) for a in (before, after))
    order = np.argmax(new[:, None] == old[None], axis=1)
    assert (order != np.arange(len(order))).any()
    inputs = np.concatenate([order + i * len(order) for i in range(repeats)])
    for leaf in ('scale', 'bias', 'mean', 'variance'):
      path = f'slim/norm/{leaf}'
      np.testing.assert_array_equal(
        after[path], np.asarray(before[path])[..., inputs], path
      )
    path = f'slim/{layer}/kernel'
    np.testing.assert_array_equal(after[path], np.asarray(before[path])[inputs])

  @parameterized.product(name=[*MODELS], by=config.IMPORTANCES)
  def test_twice_is_once(self, name, by):
    once = convert.sort_channels(create_model(name), by)
    twice = arrays_of(convert.sort_channels(once, by))
    for path, array in arrays_of(once).items():
      np.testing.assert_array_equal(twice[path], array, path)

  @parameterized.parameters(*MODELS)
  def test_every_array_keeps_its_entries(self, name):
    model = create_model(name)
    found = arrays_of(convert.sort_channels(model))
    for path, array in arrays_of(model).items():
      assert found[path].shape == array.shape
      np.testing.assert_array_equal(
        np.sort(found[path], axis=None), np.sort(array, axis=None)
      )

  def test_mobilenet_by_l1(self):
    arrays = arrays_of(convert.sort_channels(create_model('mobilenet'), 'l1'))
    for layer in ('stem', 'stages/0/0/pointwise', 'stages/1/1/pointwise'):
      assert_falling(kernel_sum(arrays, layer))

  def test_mobilenet_by_norm_scale(self):
    arrays = arrays_of(convert.sort_channels(create_model('mobilenet')))
    assert_falling(scale_sum(arrays, 'stem_norm', 'stages/0/0/depthwise_norm'))
    assert_falling(
      scale_sum(
        arrays, 'stages/1/0/pointwise_norm', 'stages/1/1/depthwise_norm'
      )
    )
    assert_falling(scale_sum(arrays, 'stages/1/1/pointwise_norm'))

  def test_resnet_by_l1(self):
    arrays = arrays_of(convert.sort_channels(create_model('resnet'), 'l1'))
    assert_falling(kernel_sum(arrays, 'stem'))
    assert_falling(kernel_sum(arrays, 'stages/1/1/reduce'))
    assert_falling(kernel_sum(arrays, 'stages/1/0/spatial'))
    stream = ('stages/1/0/expand', 'stages/1/0/projection', 'stages/1/1/expand')
    assert_falling(kernel_sum(arrays, *stream))

  def test_resnet_by_norm_scale(self):
    arrays = arrays_of(convert.sort_channels(create_model('resnet')))
    assert_falling(scale_sum(arrays, 'stem_norm'))
    assert_falling(scale_sum(arrays, 'stages/0/0/reduce_norm'))
    assert_falling(scale_sum(arrays, 'stages/1/1/spatial_norm'))
    stream = ('1/0/expand', '1/0/projection', '1/1/expand')
    assert_falling(scale_sum(arrays, *(f'stages/{n}_norm' for n in stream)))

  @parameterized.parameters(*config.IMPORTANCES)
  def test_heads_and_hidden_units_have_no_norm(self, by):
    arrays = arrays_of(convert.sort_channels(create_model('vit'), by))
    for block in ('stages/0/0', 'stages/1/1'):
      assert_falling(kernel_sum(arrays, f'{block}/expand'))
      heads = kernel_sum(arrays, f'{block}/query_key_value').reshape(3, 12)
      assert_falling(heads.sum(1))

  def test_embedding(self):
    blocks = ('stages/0/0', 'stages/1/0', 'stages/1/1')
    made = [f'{b}/{layer}' for b in blocks for layer in ('project', 'reduce')]
    arrays = arrays_of(convert.sort_channels(create_model('vit'), 'l1'))
    assert_falling(kernel_sum(arrays, 'patches', *made))
    norms = [f'{b}/{n}_norm' for b in blocks for n in ('attention', 'mlp')]
    arrays = arrays_of(convert.sort_channels(create_model('vit')))
    assert_falling(scale_sum(arrays, 'norm', *norms))

  @parameterized.parameters('mobilenet_own_gate', 'vit')
  def test_the_gate_s_norm_tells_nothing_of_importance(self, name):
    model = create_model(name)
    variables = models.variables_of(model)
    scale = variables.params['slim/norm/scale']
    # Enough to outweigh every other norm.
    steep = 100 * jnp.arange(len(scale), dtype=jnp.float32)
    other = models.Architecture(model).bind(
      variables.replace(params={**variables.params, 'slim/norm/scale': steep})
    )
    found, expected = (
      arrays_of(convert.sort_channels(m)) for m in (other, model)
    )
    for path in found.keys() - {'slim/norm/scale'}:
      np.testing.assert_array_equal(found[path], expected[path], path)

  def test_equal_channels_keep_their_order(self):
    model = create_model('resnet')
    variables = models.variables_of(model)
    params = {
      path: array if path.split('/')[-1] != 'scale' else jnp.ones_like(array)
      for path, array in variables.params.items()
    }
    model = models.Architecture(model).bind(variables.replace(params=params))
    found = arrays_of(convert.sort_channels(model))
    for path, array in arrays_of(model).items():
      np.testing.assert_array_equal(found[path], array, path)

  def test_another_importance_is_refused(self):
    with pytest.raises(ValueError, match="by='l2': expected 'norm_scale' or"):
      convert.sort_channels(create_model('vit'), 'l2')
