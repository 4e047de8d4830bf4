"""Tests of the named models' MAdds: published numbers, and XLA's own count."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import models

NAMES = models.list_models()
ARITHMETIC = {
  *('add', 'sub', 'mul', 'div', 'max', 'neg', 'square', 'gt', 'select_n'),
  # XLA makes these of several operations.
  *('logistic', 'erfc'),
}
# No arithmetic, or such as XLA counts apart, as transcendental.
FREE = {
  *('exp', 'tanh', 'rsqrt', 'sqrt', 'stop_gradient', 'convert_element_type'),
  *('slice', 'reshape', 'squeeze', 'transpose', 'broadcast_in_dim', 'pad'),
  *('concatenate', 'copy', 'jit', 'custom_jvp_call', 'platform_index'),
}


@functools.cache
def create(name):
  return models.create_abstract_model(name)


def cost(name, subnet):
  return create(name).cost(subnet, models.image_size(name))


def routed_madds(name):
  return [cost(name, s).madds for s in create(name).routing_space]


# The side of its output, the channels inside its blocks, and how many blocks.
RESNET50_STAGES = ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3))


def resnet50_layers():
  """ResNet-50's convolutions: area of the output, kernel, channels in, out."""
  yield 112**2, 7, 3, 64
  channels = 64
  for side, inner, depth in RESNET50_STAGES:
    # The first block's first convolution comes before the stride, but for the
    # first stage, which has none.
    before = 56 if inner == 64 else 2 * side
    yield before**2, 1, channels, inner
    yield side**2, 3, inner, inner
    yield side**2, 1, inner, 4 * inner
    yield side**2, 1, channels, 4 * inner
    for _ in range(depth - 1):
      yield side**2, 1, 4 * inner, inner
      yield side**2, 3, inner, inner
      yield side**2, 1, inner, 4 * inner
    channels = 4 * inner


class TargetsTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_buckets_are_ordered_by_madds(self, name):
    madds = routed_madds(name)
    assert len(madds) > 1 and (np.diff(madds) > 0).all()
    assert cost(name, create(name).widest).madds >= madds[-1]

  @parameterized.parameters(1.2e9, 2.2e9, 3.1e9)
  def test_resnet50_has_the_published_points(self, target):
    madds = np.array(routed_madds('ds_resnet50'))
    assert np.abs(madds / target - 1).min() < 0.05

  def test_widest_resnet50_is_resnet50_and_attention(self):
    madds = params = 0
    for area, kernel, width_in, width in resnet50_layers():
      madds += area * kernel**2 * width_in * width
      params += kernel**2 * width_in * width + 2 * width
    madds += 2048 * 1000 + 49 * 2048
    params += 2048 * 1000 + 1000
    # As published, of torchvision's weights.
    assert round(madds / 1e7) == 409 and params == 25_557_032
    for side, inner, depth in RESNET50_STAGES:
      reduced = inner // 4
      madds += depth * (side**2 * inner + 2 * inner * reduced)
      params += depth * (2 * inner * reduced + reduced + inner)
    found = cost('ds_resnet50', create('ds_resnet50').widest)
    assert (found.madds, found.params) == (madds, params)

  @parameterized.parameters(
    ('ds_vit_s16', 384, 22_050_664, 4.6e9),
    ('ds_vit_ti16', 192, 5_717_416, 1.26e9),
  )
  def test_widest_vit_is_the_published_one(self, name, width, params, madds):
    tokens, hidden = 14**2 + 1, 4 * width
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    expected = 14**2 * 16**2 * 3 * width + 12 * block + width * 1000
    found = cost(name, create(name).widest)
    assert found.madds == expected == pytest.approx(madds, rel=0.01)
    # Of timm's vit_small_patch16_224 and deit_tiny_patch16_224.
    assert found.params == params

  def test_vit_s16_routes_from_a_quarter_of_the_widest(self):
    madds = routed_madds('ds_vit_s16')
    assert madds[0] == pytest.approx(1.2e9, rel=0.05)
    assert madds[-1] == pytest.approx(4.6e9, rel=0.01)

  def test_mobilenet_pp_is_mobilenet_with_more_taps(self):
    plain = create('ds_mobilenet').routing_space
    for k, (subnet, madds) in enumerate(
      zip(plain, routed_madds('ds_mobilenet_pp'), strict=True)
    ):
      before, last = (s.width for s in subnet.stages[3:])
      # 5 x 5 is 16 taps more than 3 x 3. The gated block's kernel, the first of
      # six in its stage, is the trunk's.
      taps = 16 * 5 * 14**2 * before if k >= 8 else 0
      taps += 16 * 7**2 * (before + last) if k >= 4 else 0
      assert madds == cost('ds_mobilenet', subnet).madds + taps

  def test_models_are_listed(self):
    assert [*NAMES] == sorted(NAMES)
    assert {
      'ds_mobilenet',
      'ds_mobilenet_pp',
      'ds_resnet50',
      'ds_vit_s16',
    } <= {*NAMES}


def taps_on_padding(equation):
  """Multiply-adds of a convolution that fall outside of the image."""
  x, kernel = (v.aval.shape for v in equation.invars)
  shares = []
  for axis, stride, (pad, _) in zip(
    (1, 2),
    equation.params['window_strides'],
    equation.params['padding'],
    strict=True,
  ):
    count = equation.outvars[0].aval.shape[axis]
    starts = np.arange(count) * stride - pad
    taps = starts[:, None] + np.arange(kernel[axis - 1])[None]
    shares.append(((taps >= 0) & (taps < x[axis])).mean())
  size = equation.outvars[0].aval.size * math.prod(kernel[:3])
  return round(size * (1 - math.prod(shares)))


def xla_flops(function, *args):
  """The count of XLA's cost analysis, before any optimisation."""
  return jax.jit(function).lower(*args).cost_analysis().get('flops', 0)


@functools.cache
def flops_per_element(name):
  if name not in ('logistic', 'erfc'):
    return 1
  return xla_flops(getattr(jax.lax, name), np.zeros(100, np.float32)) / 100


def count_others(function, *args):
  """What XLA counts besides products, and where its count is another."""
  counts = collections.Counter()
  unpack = [jax.make_jaxpr(function)(*args).jaxpr]
  while unpack:
    for equation in unpack.pop().eqns:
      name = equation.primitive.name
      size = equation.outvars[0].aval.size
      operand = equation.invars[0].aval.size if equation.invars else 0
      if name == 'custom_vjp_call':
        inside = equation.params['call_jaxpr'].jaxpr
        forms = [e for e in inside.eqns if e.primitive.name == 'cond']
        if not forms:
          # A product, or swish.
          unpack.append(inside)
          continue
        # A depthwise convolution; a sum of n images is n - 1 additions.
        counts['elementwise'] -= size
        (on_cpu, *_) = forms[0].params['branches']
        counts['elementwise'] += sum(
          e.outvars[0].aval.size
          for e in on_cpu.jaxpr.eqns
          if e.primitive.name == 'reduce_precision'
        )
        continue
      if name == 'cond':
        # The stem; on CPU a product, which counts the padding's taps, too.
        continue
      unpack += [
        value.jaxpr
        for value in equation.params.values()
        if hasattr(value, 'jaxpr')
      ]
      if name in ARITHMETIC:
        counts['elementwise'] += flops_per_element(name) * size
      elif name in ('reduce_sum', 'reduce_max'):
        counts['elementwise'] += operand - size
        # Over pixels or tokens; over channels it is a norm's or a softmax's.
        if equation.params['axes'] != (equation.invars[0].aval.ndim - 1,):
          counts['pools'] += operand
      elif name == 'reduce_window_max':
        window = math.prod(equation.params['window_dimensions'])
        counts['elementwise'] += (window - 1) * size
      elif name == 'conv_general_dilated':
        counts['padding'] += taps_on_padding(equation)
      else:
        assert name in FREE | {'dot_general'}, name
  return counts


class XlaTest(parameterized.TestCase):
  @parameterized.product(name=NAMES, subnet=('narrowest', 'widest'))
  def test_madds_agree_with_the_count_of_xla(self, name, subnet):
    """Holds twice the MAdds to the flops of XLA's cost analysis.

    XLA also counts elementwise arithmetic (norms, activations, residuals,
    biases, softmax; 62 flops for each erfc of a GELU) and max pools; an average
    pool is 1 flop a pixel to it, not 2; and taps of a convolution that fall on
    padding are none, but for depthwise ones, which on CPU are a sum of shifted,
    padded images. These are counted from shapes, and the rest agrees.
    """
    model = create(name)
    architecture = models.Architecture(model)
    subnet = getattr(model, subnet)
    side = models.image_size(name)
    args = (
      models.variables_of(model),
      jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
    )

    def run(variables, images):
      return architecture.bind(variables)(images, subnet)

    counts = count_others(run, *args)
    products = xla_flops(run, *args) - counts['elementwise']
    products += 2 * counts['padding']
    expected = 2 * (model.cost(subnet, side).madds - counts['pools'])
    # The rest is a few scalars, such as what an image is padded with.
    assert products == pytest.approx(expected, rel=1e-4)
