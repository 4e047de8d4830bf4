"""Tests of reading torchvision's ResNet weights; see golden_pretrained_test."""

import numpy as np
import pytest
from absl.testing import parameterized

import fixed
import plain
from ds_jax import convert, models


class FromTorchvisionTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = models.create_model('ds_resnet50', 5, **plain.RESNET)
    cls.state = plain.resnet_state()
    cls.images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
    cls.images = cls.images.astype(np.float32)

  def test_widest_network_is_the_source(self):
    model = convert.from_torchvision_resnet50(self.state, self.model)
    found = plain.logits(model, self.images, model.widest)
    expected = np.asarray(plain.resnet_logits(self.state, self.images))
    # Float32 through 11 convolutions.
    fixed.assert_close({'logits': found}, {'logits': expected}, 1e-5)

  def test_every_row_of_statistics_is_the_source_s(self):
    model = convert.from_torchvision_resnet50(self.state, self.model)
    rows = models.variables_of(model).batch_stats
    found = rows['stages/1/0/projection_norm/variance']
    assert found.shape == (4, 24)
    theirs = self.state['layer2.0.downsample.1.running_var']
    np.testing.assert_array_equal(found, np.tile(theirs, (4, 1)))

  def test_what_the_source_lacks_stays_the_model_s(self):
    model = convert.from_torchvision_resnet50(self.state, self.model)
    old, new = (models.variables_of(m).params for m in (self.model, model))
    kept = {path for path in old if np.array_equal(old[path], new[path])}
    assert kept == {p for p in old if 'gate' in p or 'slim' in p}

  def test_other_classes_get_a_fresh_classifier(self):
    model = plain.random_model('ds_resnet50', 3, **plain.RESNET)
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_torchvision_resnet50(self.state, model)
    assert 'of 5 classes and the model of 3' in logs.output[0]
    same = convert.from_torchvision_resnet50(self.state, self.model)
    old, new, full = (
      models.variables_of(m).params for m in (model, found, same)
    )
    for path in new:
      is_own = path.startswith(('classifier/', 'slim/')) or '/gate/' in path
      expected = old if is_own else full
      np.testing.assert_array_equal(new[path], expected[path], path)

  def test_no_classifier_leaves_the_model_s(self):
    state = {n: a for n, a in self.state.items() if not n.startswith('fc.')}
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_torchvision_resnet50(state, self.model)
    assert 'no classifier (fc.bias, fc.weight)' in logs.output[0]
    np.testing.assert_array_equal(
      found.classifier.kernel[...], self.model.classifier.kernel[...]
    )

  def test_all_misfits_are_in_one_error(self):
    state = dict(self.state)
    del state['fc.weight'], state['bn1.running_var']
    state['layer3.0.conv1.weight'] = np.zeros((3, 4, 1, 1))
    state['layer1.0.bn3.weight'] = np.zeros(7)
    with pytest.raises(ValueError) as raised:
      convert.from_torchvision_resnet50(state, self.model)
    assert sorted(str(raised.value).split('\n  ')[1:]) == [
      'missing: bn1.running_var (8,)',
      'missing: fc.weight (5, 24)',
      'shape of layer1.0.bn3.weight: (7,), expected (16,)',
      'unknown: layer3.0.conv1.weight',
    ]

  def test_another_family_is_refused(self):
    model = models.create_abstract_model('ds_mobilenet_tiny')
    with pytest.raises(ValueError, match='fit a ResNet, .* is a MobileNet'):
      convert.from_torchvision_resnet50(self.state, model)

  def test_an_abstract_model_has_nothing_to_keep(self):
    model = models.create_abstract_model('ds_resnet50', 5, **plain.RESNET)
    with pytest.raises(ValueError, match='make it with create_model'):
      convert.from_torchvision_resnet50(self.state, model)
