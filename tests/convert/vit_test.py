"""Tests of reading ViT weights; see golden_pretrained_test, too."""

import jax
import numpy as np
import pytest
from absl.testing import parameterized

import fixed
import plain
from ds_jax import convert, models


def create_model(num_classes=5, **options):
  return plain.random_model(
    'ds_vit_s16', num_classes, **{**plain.VIT, **options}
  )


def params_of(model):
  return models.variables_of(model).params


class FromTimmTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_model()
    cls.state = plain.vit_state()
    cls.images = np.random.default_rng(1).normal(size=(2, 16, 16, 3))
    cls.images = cls.images.astype(np.float32)

  def assert_equal_logits(self, model, expected):
    # Float32 through three blocks.
    fixed.assert_close(
      {'logits': plain.logits(model, self.images, model.widest)},
      {'logits': np.asarray(expected)},
      1e-5,
    )

  def assert_equal_params(self, model, other):
    expected = params_of(other)
    for path, array in params_of(model).items():
      np.testing.assert_array_equal(array, expected[path], path)

  def test_widest_network_is_the_source(self):
    model = convert.from_timm_vit(self.state, self.model)
    expected = plain.vit_logits(self.state, self.images)
    self.assert_equal_logits(model, expected)

  def test_pooling_by_the_mean(self):
    state = plain.vit_state(class_token=False)
    model = convert.from_timm_vit(state, create_model(pooling='mean'))
    self.assert_equal_logits(model, plain.vit_logits(state, self.images))

  def test_epsilon_of_hugging_face_is_near(self):
    model = convert.from_timm_vit(plain.hugging_face(self.state), self.model)
    expected = plain.vit_logits(self.state, self.images, epsilon=1e-12)
    self.assert_equal_logits(model, expected)

  @parameterized.product(
    rename=[plain.hugging_face, plain.transformers_5],
    prefix=['', 'module.', '_orig_mod.module.', 'backbone.net.'],
  )
  def test_names_of_hugging_face(self, rename, prefix):
    state = {
      f'{prefix}{name}': array for name, array in rename(self.state).items()
    }
    self.assert_equal_params(
      convert.from_timm_vit(state, self.model),
      convert.from_timm_vit(self.state, self.model),
    )

  def test_a_body_of_hugging_face(self):
    state = {
      name.removeprefix('vit.'): array
      for name, array in plain.hugging_face(self.state).items()
      if 'classifier' not in name
    }
    state['pooler.dense.weight'] = np.zeros((12, 12))
    with self.assertLogs('absl', 'WARNING') as logs:
      model = convert.from_timm_vit(state, self.model)
    assert 'no classifier (classifier.bias, ' in logs.output[0]
    full = params_of(convert.from_timm_vit(self.state, self.model))
    fresh = params_of(self.model)
    for path, array in params_of(model).items():
      expected = fresh if path.startswith('classifier') else full
      np.testing.assert_array_equal(array, expected[path], path)

  @parameterized.parameters(dict, plain.hugging_face, plain.transformers_5)
  def test_queries_keys_and_values_without_biases(self, rename):
    biases = [name for name in self.state if name.endswith('qkv.bias')]
    zeros = {name: np.zeros_like(self.state[name]) for name in biases}
    expected = plain.vit_logits({**self.state, **zeros}, self.images)
    state = rename(self.state)
    endings = ('qkv.bias', 'query.bias', 'key.bias', 'value.bias')
    endings += tuple(f'{x}_proj.bias' for x in 'qkv')
    state = {n: x for n, x in state.items() if not n.endswith(endings)}
    assert len(rename(self.state)) - len(state) in (3, 9)
    model = convert.from_timm_vit(state, self.model)
    self.assert_equal_logits(model, expected)

  def test_gate_stays_the_model_s(self):
    model = convert.from_timm_vit(self.state, self.model)
    old, new = params_of(self.model), params_of(model)
    kept = {path for path in old if np.array_equal(old[path], new[path])}
    assert kept == {path for path in old if path.startswith('slim/')}

  def test_position_of_another_image_size_is_resized(self):
    model = create_model(image_size=24)
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_timm_vit(self.state, model).position[...]
    assert 'from 4 x 4 to 6 x 6 patches' in logs.output[0]
    theirs = self.state['pos_embed'][0]
    np.testing.assert_array_equal(found[0], theirs[0])
    # Bicubic is separable: rows, then columns, each by a matrix.
    matrix = np.asarray(jax.image.resize(np.eye(4), (6, 4), 'cubic'))
    grid = theirs[1:].reshape(4, 4, 12)
    expected = np.einsum('ai,bj,ijd->abd', matrix, matrix, grid)
    np.testing.assert_allclose(found[1:], expected.reshape(36, 12), atol=1e-5)

  def test_tokens_that_make_no_square_are_misshapen(self):
    state = {**self.state, 'pos_embed': np.zeros((1, 16, 12))}
    with pytest.raises(ValueError, match=r'pos_embed: \(1, 16, .*\(1, 17, 12'):
      convert.from_timm_vit(state, self.model)

  def test_other_classes_get_a_fresh_classifier(self):
    model = create_model(num_classes=3)
    with self.assertLogs('absl', 'WARNING') as logs:
      found = convert.from_timm_vit(self.state, model)
    assert 'of 5 classes and the model of 3' in logs.output[0]
    np.testing.assert_array_equal(
      found.classifier.kernel[...], model.classifier.kernel[...]
    )

  def test_all_misfits_are_in_one_error(self):
    state = dict(self.state)
    del state['blocks.1.attn.qkv.bias']
    state['blocks.0.ls1.gamma'] = np.zeros(12)
    state['blocks.2.mlp.fc1.weight'] = np.zeros((30, 12))
    with pytest.raises(ValueError) as raised:
      convert.from_timm_vit(state, self.model)
    assert sorted(str(raised.value).split('\n  ')[1:]) == [
      'missing: blocks.1.attn.qkv.bias (36,)',
      'shape of blocks.2.mlp.fc1.weight: (30, 12), expected (20, 12)',
      'unknown: blocks.0.ls1.gamma',
    ]

  @parameterized.parameters(
    ('dist_token', 'without distillation'),
    ('deit.embeddings.distillation_token', 'without distillation'),
    ('fc_norm.weight', 'fc_norm=False'),
  )
  def test_what_the_model_cannot_compute_is_refused(self, name, message):
    state = {**self.state, name: np.zeros((1, 1, 12))}
    with pytest.raises(ValueError, match=message):
      convert.from_timm_vit(state, self.model)
