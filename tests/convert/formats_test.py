"""Tests of telling whose weights a state holds."""

import re

import numpy as np
import pytest

import plain
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


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'a.b_2.'])
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
    plain.transformers_5(plain.vit_state(num_classes=7)),
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
    convert.from_state(state, model)
  assert str(raised.value) == (
    'Unknown weights, with names like these: features.0.weight,'
    " features.1.weight, features.2.weight. Expected those of the authors'"
    " DS-Net, torchvision's ResNet-50, timm's ViT or Hugging Face's ViT."
  )


def test_several_networks_in_a_state_are_named():
  state = {
    f'{prefix}.backbone.{name}': array
    for prefix in ('teacher', 'student')
    for name, array in plain.resnet_state().items()
  }
  model = models.create_abstract_model('ds_resnet26_cifar')
  with pytest.raises(
    ValueError,
    match="prefixes 'student.backbone.', 'teacher.backbone.': keep .* as with"
    ' --state=teacher.backbone or',
  ):
    convert.from_state(state, model)


# Of torch.compile, FullyShardedDataParallel, checkpoint_wrapper, Fabric.
@pytest.mark.parametrize(
  'wrapper',
  [
    '_orig_mod',
    '_fsdp_wrapped_module',
    '_checkpoint_wrapped_module',
    '_forward_module._fsdp_wrapped_module',
  ],
)
def test_wrappers_of_parts_are_taken_off(wrapper):
  model = plain.random_model('ds_vit_s16', 5, **plain.VIT)
  state = plain.vit_state()
  wrapped = {
    'module.' + re.sub(r'^(blocks\.\d+\.(attn\.)?)', rf'\1{wrapper}.', n): a
    for n, a in state.items()
  }
  assert f'module.blocks.0.attn.{wrapper}.qkv.weight' in wrapped
  found, expected = (
    models.variables_of(convert.from_state(s, model)).params
    for s in (wrapped, state)
  )
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, path)


def test_an_averaged_model_s_counter_is_passed_over():
  model = plain.random_model('ds_vit_s16', 5, **plain.VIT)
  state = {f'module.{n}': a for n, a in plain.vit_state().items()}
  state['n_averaged'] = np.int64(3)
  found = convert.from_state(state, model)
  np.testing.assert_array_equal(
    found.classifier.kernel[...], state['module.head.weight'].T
  )


def test_numbers_that_are_not_finite_are_refused_by_name():
  model = plain.random_model('ds_vit_s16', 5, **plain.VIT)
  state = {name: array.copy() for name, array in plain.vit_state().items()}
  state['head.weight'][0, :2] = np.nan, np.inf
  state['norm.bias'][0] = -np.inf
  with pytest.raises(ValueError, match='infinite or NaN') as raised:
    convert.from_state(state, model)
  problems = str(raised.value).split('\n  ')[1:]
  assert problems == ['head.weight: 2', 'norm.bias: 1']


@pytest.mark.parametrize(
  'rename', [dict, plain.hugging_face, plain.transformers_5]
)
def test_any_vit_is_loaded(rename):
  model = plain.random_model('ds_vit_s16', 5, **plain.VIT)
  state = plain.vit_state()
  found = convert.from_state(rename(state), model)
  np.testing.assert_array_equal(
    found.classifier.kernel[...], state['head.weight'].T
  )
