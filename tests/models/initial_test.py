"""Tests of initial weights: their distributions, layer by layer."""

import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from ds_jax import models


def params(name, init, **options):
  model = models.create_model(name, 10, seed=3, init=init, **options)
  return {
    path: np.asarray(array)
    for path, array in models.variables_of(model).params.items()
  }


def check_normal(kernel, deviation, name):
  """By Kolmogorov and Smirnov, at a level that chance meets nowhere here."""
  p = stats.kstest(kernel.ravel() / deviation, 'norm').pvalue
  assert p > 1e-4, name


def check_uniform(kernel, bound, name):
  p = stats.kstest(kernel.ravel() / bound, stats.uniform(-1, 2).cdf).pvalue
  assert p > 1e-4, name


def fan_out(path, shape):
  """How many outputs read one input of a kernel, as PyTorch's are counted."""
  is_depthwise = path.endswith('depthwise/kernel')
  area = np.prod(shape[:-2], dtype=int)
  return area * (1 if is_depthwise else shape[-1])


class FanOutTest(parameterized.TestCase):
  def test_is_the_release_s(self):
    found = params('ds_mobilenet_tiny', 'fan_out', gate_head='shared')
    classifier = found.pop('classifier/kernel')
    check_uniform(classifier, 10**-0.5, 'classifier')
    kernels = {p: k for p, k in found.items() if p.endswith('kernel')}
    slimming = [p for p in kernels if models.is_slimming(p)]
    for path in slimming:  # every bucket equally likely
      assert not kernels.pop(path).any()
    assert len(slimming) == 1 and len(kernels) == 1 + 8 * 4
    for path, kernel in kernels.items():
      deviation = (2 / fan_out(path, kernel.shape)) ** 0.5
      check_normal(kernel, deviation, path)
    for path, array in found.items():
      if not path.endswith('kernel'):
        np.testing.assert_array_equal(array, path.endswith('scale'))

  def test_attention_that_is_the_identity_stays_so(self):
    found = params('ds_resnet26_cifar', 'fan_out')
    heads = [k for p, k in found.items() if p.endswith('gate/expand/kernel')]
    assert len(heads) == 8 and not any(head.any() for head in heads)


class TruncatedNormalTest(parameterized.TestCase):
  def test_is_deit_s(self):
    found = params('ds_vit_cifar', 'truncated_normal')
    bound = (3 * 4 * 4) ** -0.5
    for name in ('patches/kernel', 'patches/bias'):
      check_uniform(found.pop(name), bound, name)
    checked = 0
    for path, array in found.items():
      if models.is_slimming(path) and path.endswith('head/kernel'):
        assert not array.any()
      elif path.endswith('kernel'):
        check_normal(array, 0.02, path)
        checked += 1
      elif path.endswith('bias'):
        assert not array.any()
    # Four kernels a block, the classifier, and two hidden layers of the gate.
    assert checked == 4 * 7 + 1 + 2


def test_another_init_is_refused():
  with pytest.raises(ValueError, match="init='he': expected 'lecun' or 'fan_"):
    models.create_abstract_model('ds_mobilenet', init='he')
