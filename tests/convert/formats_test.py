"""Tests of telling whose weights a state holds."""

import numpy as np
import pytest

from convert import plain
from ds_jax import convert, models
from ds_jax.convert import formats

STATES = {
  'ds_mobilenet': {'blocks.3.first_block.conv_pw.weight': np.zeros(1)},
  'ds_resnet50': {'layer1.0.conv1.weight': np.zeros(1)},
  'ds_vit_ti16': plain.vit_state(width=192, hidden=8, depth=1),
  'ds_vit_s16': plain.hugging_face(
    plain.vit_state(width=384, hidden=8, depth=1)
  ),
}


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('name', STATES)
def test_the_model_is_told_by_the_names(name, prefix):
  state = {prefix + key: array for key, array in STATES[name].items()}
  assert formats.recognise(state).default_model(state) == name


def test_a_vit_of_another_width_needs_a_model():
  state = plain.vit_state()
  with pytest.raises(ValueError, match=r'of 12 channels.*\[192, 384\]'):
    formats.recognise(state).default_model(state)


def test_classes_are_counted():
  for state in (
    plain.resnet_state(num_classes=7),
    plain.vit_state(num_classes=7),
    plain.hugging_face(plain.vit_state(num_classes=7)),
  ):
    assert formats.recognise(state).num_classes(state) == 7
  del state['classifier.bias']
  with pytest.raises(ValueError, match='no classifier .*--num_classes='):
    formats.recognise(state).num_classes(state)


def test_unknown_names_are_shown():
  state = {f'features.{i}.weight': np.zeros(1) for i in range(9)}
  model = models.create_abstract_model('ds_mobilenet_tiny')
  with pytest.raises(ValueError) as raised:
    convert.from_any(state, model)
  assert str(raised.value) == (
    'Unknown weights, with names like these: features.0.weight,'
    " features.1.weight, features.2.weight. Expected those of the authors'"
    " DS-Net, torchvision's ResNet-50, timm's ViT or Hugging Face's ViT."
  )


@pytest.mark.parametrize('rename', [dict, plain.hugging_face])
def test_any_vit_is_loaded(rename):
  model = plain.random_model('ds_vit_s16', 5, **plain.VIT)
  state = plain.vit_state()
  found = convert.from_any(rename(state), model)
  np.testing.assert_array_equal(
    found.classifier.kernel[...], state['head.weight'].T
  )
