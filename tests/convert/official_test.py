"""Tests of reading the authors' weights: names, layouts, refusals.

That the weights mean the same here is held by golden_test.
"""

import pathlib

import numpy as np
import pytest
from absl.testing import parameterized

import fixed
from ds_jax import convert, models
from ds_jax.convert import official

GOLDEN = dict(
  np.load(pathlib.Path(__file__).parents[1] / 'official_dsnet_tiny.npz')
)
STATE = {
  name.removeprefix('state/'): array
  for name, array in GOLDEN.items()
  if name.startswith('state/')
}


class TorchLike:
  """What of a tensor on an accelerator, with gradient, can be had at once."""

  def __init__(self, array, place='accelerator'):
    self._array, self._place = array, place
    self.shape = array.shape

  def detach(self):
    return TorchLike(self._array, self._place + ', detached')

  def cpu(self):
    return TorchLike(self._array, self._place + ', cpu')

  def float(self):
    return TorchLike(self._array, self._place + ', float32')

  def numpy(self):
    assert self._place == 'accelerator, detached, cpu, float32'
    return self._array

  def __array__(self, *args, **kwargs):
    raise TypeError("can't convert an accelerator's tensor to numpy.")


def create_model(num_classes=10, **options):
  return models.create_abstract_model(
    'ds_mobilenet',
    num_classes,
    **options,
    stem_widths=(8, 12),
    stages=(
      dict(widths=(8, 16)),
      dict(widths=(16, 24), stride=2),
      dict(widths=(16, 24)),
      dict(widths=(16, 24, 32, 40), depth=2, stride=2),
      dict(widths=(24, 32, 40, 48), stride=2),
    ),
    gate_stage=3,
  )


def converted(state):
  return models.variables_of(convert.from_official(state, create_model()))


def assert_equal_variables(found, expected):
  for kind in ('params', 'batch_stats'):
    one, other = getattr(found, kind), getattr(expected, kind)
    assert one.keys() == other.keys()
    for path, array in one.items():
      assert array.dtype == np.float32
      np.testing.assert_array_equal(array, other[path], path)


class FromOfficialTest(parameterized.TestCase):
  def test_each_kind_of_array_is_laid_out_anew(self):
    params = converted(STATE).params
    stem = STATE['conv_stem.weight']
    assert params['stem/kernel'][2, 0, 1, 7] == stem[7, 1, 2, 0]
    block = 'blocks.3.residual_blocks.0'
    depthwise = STATE[f'{block}.conv_dw.weight']
    found = params['stages/3/1/depthwise/kernel']
    assert found[2, 0, 0, 7] == depthwise[7, 0, 2, 0]
    pointwise = STATE['blocks.4.first_block.conv_pw.weight']
    found = params['stages/4/0/pointwise/kernel']
    assert found[3, 7] == pointwise[7, 3, 0, 0]
    slim = STATE['blocks.3.first_block.gate.gate.0.weight']
    found = params['stages/3/0/gate/slim/kernel']
    assert found[5, 3] == slim[3, 5, 0, 0]
    classifier = STATE['classifier.weight']
    assert params['classifier/kernel'][7, 3] == classifier[3, 7]

  def test_every_weight_is_taken_once(self):
    learned = [a for n, a in STATE.items() if 'running' not in n]
    found = converted(STATE).params.values()
    ours, theirs = (
      np.sort(np.concatenate([np.ravel(a) for a in arrays]))
      for arrays in (found, learned)
    )
    np.testing.assert_array_equal(ours, theirs)

  @parameterized.named_parameters(
    ('stem', 'stem_norm', 'bn1', (8, 12), (0, 1)),
    ('trunk', 'stages/1/0/pointwise_norm', 'blocks.1.first_block.bn2',
     (16, 24), (0, 1)),
    ('gated', 'stages/3/0/depthwise_norm', 'blocks.3.first_block.bn1',
     (16, 24), (0, 1)),
    ('branch', 'stages/3/1/depthwise_norm', 'blocks.3.residual_blocks.0.bn1',
     (16, 24, 32, 40, 40), (0, 1, 2, 3, 3)),
    ('last', 'stages/4/0/pointwise_norm', 'blocks.4.first_block.bn2',
     (24, 32, 40, 48, 48), (0, 1, 2, 3, 3)),
  )  # fmt: skip
  def test_statistics_fill_the_rows(self, ours, theirs, widths, indices):
    batch_stats = converted(STATE).batch_stats
    for kind, name, fill in (
      ('mean', 'running_mean', 0),
      ('variance', 'running_var', 1),
    ):
      rows = np.asarray(batch_stats[f'{ours}/{kind}'])
      assert rows.shape == (len(widths), widths[-1])
      for row, width, index in zip(rows, widths, indices, strict=True):
        expected = STATE[f'{theirs}.aux_bn.{index}.{name}']
        np.testing.assert_array_equal(row[:width], expected)
        assert (row[width:] == fill).all()

  def test_parallel_prefix_and_batch_counts_are_passed_over(self):
    state = {f'module.{name}': array for name, array in STATE.items()}
    state['module.bn1.aux_bn.0.num_batches_tracked'] = np.int64(7)
    assert_equal_variables(converted(state), converted(STATE))

  def test_torch_tensors_are_read(self):
    state = {name: TorchLike(array) for name, array in STATE.items()}
    assert_equal_variables(converted(state), converted(STATE))

  def test_other_floats_become_float32(self):
    state = {n: a.astype(np.float64) for n, a in STATE.items()}
    assert_equal_variables(converted(state), converted(STATE))

  def test_model_given_is_left_as_it_was(self):
    model = convert.from_official(STATE, create_model())
    other = {name: array + 1 for name, array in STATE.items()}
    convert.from_official(other, model)
    assert_equal_variables(models.variables_of(model), converted(STATE))

  def test_all_misfits_are_in_one_error(self):
    state = dict(STATE)
    del state['conv_stem.weight']
    del state['blocks.3.first_block.bn2.aux_bn.2.running_var']
    state['conv_head.weight'] = np.zeros((3, 4))
    state['blocks.9.bias'] = np.zeros(3)
    state['classifier.bias'] = np.zeros(11)
    state['blocks.0.first_block.conv_pw.weight'] = np.zeros((16, 12))
    with pytest.raises(ValueError) as raised:
      convert.from_official(state, create_model())
    problems = str(raised.value).split('\n  ')[1:]
    assert sorted(problems) == [
      'missing: blocks.3.first_block.bn2.aux_bn.2.running_var (32,)',
      'missing: conv_stem.weight (12, 3, 3, 3)',
      'shape of blocks.0.first_block.conv_pw.weight: (16, 12), expected'
      ' (16, 12, 1, 1)',
      'shape of classifier.bias: (11,), expected (10,)',
      'unknown: blocks.9.bias',
      'unknown: conv_head.weight',
    ]

  def test_other_classes_get_a_fresh_classifier(self):
    model = create_model(num_classes=7)
    model = models.Architecture(model).bind(fixed.random_variables(model))
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_official(STATE, model)
    assert 'of 10 classes and the model of 7' in logs.output[0]
    found = models.variables_of(found)
    expected = converted(STATE)
    for path in ('classifier/kernel', 'classifier/bias'):
      expected.params[path] = models.variables_of(model).params[path]
    assert_equal_variables(found, expected)

  def test_an_abstract_model_has_no_classifier_to_keep(self):
    with pytest.raises(ValueError, match="its own .'classifier/bias'.*create"):
      convert.from_official(STATE, create_model(num_classes=7))

  def test_a_head_for_the_first_widths_makes_a_gate_over_them(self):
    head = 'blocks.3.first_block.gate.gate.0.weight'
    state = {**STATE, head: STATE[head][:2]}
    options = official.model_options(state)
    assert options == {'gate_buckets': (0, 1)}
    model = convert.from_official(state, create_model(**options))
    found, expected = models.variables_of(model), converted(STATE)
    path = 'stages/3/0/gate/slim/kernel'
    expected.params[path] = expected.params[path][:, :2]
    assert_equal_variables(found, expected)
    assert official.model_options(STATE) == {}

  def test_a_head_for_other_buckets_leaves_the_model_its_own(self):
    head = 'blocks.3.first_block.gate.gate.0.weight'
    state = {**STATE, head: STATE[head][:2]}
    model = create_model()
    model = models.Architecture(model).bind(fixed.random_variables(model))
    with self.assertLogs('absl', 'WARNING') as logs:
      found = models.variables_of(convert.from_official(state, model))
    assert 'for 2 buckets and that of the model for 4' in logs.output[0]
    assert 'gate_buckets=(0, 1)' in logs.output[0]
    expected = converted(STATE)
    path = 'stages/3/0/gate/slim/kernel'
    expected.params[path] = models.variables_of(model).params[path]
    assert_equal_variables(found, expected)
    del state[head]
    with pytest.raises(ValueError, match=f'missing: {head}'):
      convert.from_official(state, model)
