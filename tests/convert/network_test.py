"""Tests of starting from another checkpoint of ds_jax."""

import numpy as np
import pytest
from absl.testing import parameterized

import plain
from ds_jax import convert, models

SEPARABLE = dict(
  stem_widths=(4, 8),
  stages=(
    dict(widths=(4, 8)),
    dict(widths=(4, 8, 12), depth=2, stride=2),
  ),
  gate_stage=1,
)
FAMILIES = {
  'ds_mobilenet': SEPARABLE,
  'ds_resnet50': plain.RESNET,
  'ds_vit_s16': plain.VIT,
}


def create_model(name, num_classes=5, **options):
  return plain.random_model(name, num_classes, **{**FAMILIES[name], **options})


def source(name, **options):
  """The arrays of another network, none of which are those of a model above."""
  options = {**FAMILIES[name], **options}
  return models.variables_of(plain.random_model(name, 5, seed=1, **options))


def arrays_of(variables):
  return {**variables.params, **variables.batch_stats}


class FromNetworkTest(parameterized.TestCase):
  def load(self, variables, model, *warnings):
    """Loads, and checks what is warned of; returns the arrays."""
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_network(variables, model)
    assert len(logs.output) == len(warnings)
    for line, expected in zip(logs.output, warnings, strict=True):
      assert expected in line
    return arrays_of(models.variables_of(found))

  def assert_taken_but(self, found, variables, *paths):
    """All arrays are the source's but these, which differ."""
    expected = arrays_of(variables)
    differ = {
      path for path in found if not np.array_equal(found[path], expected[path])
    }
    assert differ == set(paths)

  @parameterized.parameters(*FAMILIES)
  def test_the_same_network_is_taken_whole(self, name):
    variables = source(name)
    with self.assertNoLogs('absl', 'WARNING'):
      found = convert.from_network(variables, create_model(name))
    self.assert_taken_but(arrays_of(models.variables_of(found)), variables)

  @parameterized.parameters(*FAMILIES)
  def test_other_classes_get_a_fresh_classifier(self, name):
    variables = source(name)
    model = create_model(name, num_classes=3)
    found = self.load(variables, model, 'of 5 classes and the model of 3')
    classifier = ('classifier/kernel', 'classifier/bias')
    self.assert_taken_but(found, variables, *classifier)
    own = models.variables_of(model).params
    for path in classifier:
      np.testing.assert_array_equal(found[path], own[path])

  def test_positions_are_resized(self):
    variables = source('ds_vit_s16')
    model = create_model('ds_vit_s16', image_size=24)
    found = self.load(variables, model, 'from 4 x 4 to 6 x 6')
    self.assert_taken_but(found, variables, 'position')
    assert found['position'].shape == (37, 12)
    np.testing.assert_array_equal(
      found['position'][0], variables.params['position'][0]
    )

  # Of the source's rows 0 .. 3, the last is the widest network's.
  @parameterized.parameters(
    ((4, 12), (0, 1, 3)), ((4, 6, 8, 10, 12), (0, 1, 2, 3, 3, 3))
  )
  def test_other_buckets(self, widths, rows):
    variables = source('ds_mobilenet')
    trunk, branch = SEPARABLE['stages']
    model = create_model(
      'ds_mobilenet', stages=(trunk, dict(branch, widths=widths))
    )
    slim = 'stages/1/0/gate/slim/kernel'
    found = self.load(variables, model, slim)
    assert found[slim].shape == (2, len(widths))
    np.testing.assert_array_equal(
      found[slim], models.variables_of(model).params[slim]
    )
    for path, array in variables.batch_stats.items():
      taken = (0, 1) if len(array) == 2 else rows
      np.testing.assert_array_equal(
        found[path], np.asarray(array)[list(taken)], path
      )

  @parameterized.parameters(
    # The norm is of the same inputs, and so is the last layer.
    (
      {'gate_hidden': (64, 5)},
      ('hidden/1/kernel', 'hidden/1/bias', 'head/kernel'),
    ),
    (
      {'gate_hidden': ()},
      ('hidden/0/', 'hidden/1/', 'head/kernel'),
    ),
    (
      {'gate_pooling': 'mean'},
      ('norm/', 'hidden/0/kernel'),
    ),
  )
  def test_layers_of_another_gate_are_fresh(self, options, layers):
    variables = source('ds_vit_s16', **options)
    model = create_model('ds_vit_s16')
    found = self.load(variables, model, 'slim/' + layers[-1])
    own = arrays_of(models.variables_of(model))
    theirs = arrays_of(variables)
    assert found.keys() == own.keys()
    fresh = tuple(f'slim/{layer}' for layer in layers)
    for path, array in found.items():
      expected = own if path.startswith(fresh) else theirs
      np.testing.assert_array_equal(array, expected[path], path)

  def test_a_gate_elsewhere_is_a_fresh_one(self):
    stages = (
      dict(widths=(4, 8), depth=1),
      dict(widths=(4, 8), depth=1),
      dict(widths=(4, 8), depth=1),
    )
    variables = source('ds_mobilenet', stages=stages, gate_stage=1)
    model = create_model('ds_mobilenet', stages=stages, gate_stage=2)
    slim = 'stages/2/0/gate/slim/kernel'
    found = self.load(variables, model, slim)
    assert found.keys() == arrays_of(models.variables_of(model)).keys()
    np.testing.assert_array_equal(
      found[slim], models.variables_of(model).params[slim]
    )

  def test_all_else_that_differs_is_in_one_error(self):
    variables = source('ds_resnet50')
    wider = dict(plain.RESNET['stem'], widths=(4, 10))
    deeper = (
      dict(plain.RESNET['stages'][0], depths=(2,)),
      plain.RESNET['stages'][1],
    )
    model = create_model('ds_resnet50', stem=wider, stages=deeper)
    with pytest.raises(ValueError) as raised:
      convert.from_network(variables, model)
    problems = str(raised.value).split('\n  ')[1:]
    assert 'missing: stages/0/1/spatial/kernel (3, 3, 6, 6)' in problems
    assert (
      'shape of stem/kernel: (7, 7, 3, 8), expected (7, 7, 3, 10)' in problems
    )
    assert 'shape of stem_norm/mean: (2, 8), expected (2, 10)' in problems
    assert not any(problem.startswith('unknown') for problem in problems)
    with pytest.raises(ValueError, match='unknown: class_token'):
      convert.from_network(source('ds_vit_s16'), model)
