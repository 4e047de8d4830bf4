"""Compares a sub-network with a fixed network that is written anew.

A family's test writes its network in plain JAX, with sizes read off the
weights, and says by hand where in the supernet's arrays those weights lie. The
rest, alike for every family, is here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import models


def random_variables(model, seed=0):
  """Weights and statistics of which no two are alike."""
  rng = np.random.default_rng(seed)

  def fill(path, array):
    if path.endswith(('scale', 'variance')):
      return rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
    if path.endswith('gate/reduce/bias'):  # Past the ReLU, for a gradient.
      return rng.uniform(1, 2, array.shape).astype(np.float32)
    if path.endswith(('bias', 'mean')):
      return rng.normal(0, 0.3, array.shape).astype(np.float32)
    fan_in = max(np.prod(array.shape[:-1]), 1)
    return rng.normal(0, fan_in**-0.5, array.shape).astype(np.float32)

  def fill_all(arrays):
    # The slimming head last, so that the rest does not depend on its form.
    paths = sorted(arrays, key=models.is_slimming)
    return {path: fill(path, arrays[path]) for path in paths}

  variables = models.variables_of(model)
  params = fill_all(variables.params)
  return models.Variables(params, fill_all(variables.batch_stats))


def calibrated_variables(model, images, seed=0):
  """Random ones with these images' statistics, lest all images look alike."""

  @jax.jit
  def run(variables):
    bound = models.Architecture(model).bind(variables)
    bound.gate_logits(bound.trunk(images, momentum=1.0), momentum=1.0)
    for subnet in model.sub_networks:
      bound(images, subnet, momentum=1.0)
    return models.variables_of(bound)

  return run(random_variables(model, seed))


def cut(arrays, slices):
  return {path: np.array(arrays[path][index]) for path, index in slices.items()}


def assert_close(found, expected, tolerance):
  """Compares to each array's largest magnitude."""
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    scale = np.abs(value).max()
    assert np.abs(found[path] - value).max() <= tolerance * scale, path


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


def along_channels(vector, ndim=4):
  return vector.reshape((1,) * (ndim - 1) + (-1,))


def batch_norm(x, name, params, stats):
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


def dense(x, name, params):
  bias = along_channels(params[f'{name}/bias'], x.ndim)
  return x @ params[f'{name}/kernel'] + bias


def slimming_logits(features, variables):
  """A slimming gate's logits of features (N, ..., C), in float64.

  A batch norm, of the running statistics, of the mean, the maximum and the
  deviation of each channel; two hidden layers; a head without bias.
  """
  arrays = {
    path.removeprefix('slim/'): np.asarray(array, np.float64)
    for path, array in (variables.params | variables.batch_stats).items()
    if path.startswith('slim/')
  }
  x = np.asarray(features, np.float64)
  x = x.reshape(len(x), -1, x.shape[-1])
  deviation = np.sqrt(((x - x.mean(1, keepdims=True)) ** 2).mean(1) + 1e-6)
  x = np.concatenate([x.mean(1), x.max(1), deviation], axis=1)
  x = (x - arrays['norm/mean']) / np.sqrt(arrays['norm/variance'] + 1e-5)
  x = x * arrays['norm/scale'] + arrays['norm/bias']
  for layer in ('hidden/0', 'hidden/1'):
    x = x @ arrays[f'{layer}/kernel'] + arrays[f'{layer}/bias']
    x = np.maximum(x, 0)
  return x @ arrays['head/kernel']


def equations(jaxpr):
  """All equations of a program, with those that they contain."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        yield from equations(value.jaxpr)


def count_madds(function, *args):
  """Multiply-adds in a program: convolutions, products, average pools."""
  total = 0
  for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
    operands = [v.aval.shape for v in equation.invars]
    outputs = equation.outvars[0].aval.size
    if equation.primitive.name == 'conv_general_dilated':
      # HWIO, where I is already the inputs of one group.
      total += outputs * np.prod(operands[1][:3])
    elif equation.primitive.name == 'dot_general':
      ((contracted, _), _) = equation.params['dimension_numbers']
      total += outputs * np.prod([operands[0][i] for i in contracted])
    elif equation.primitive.name == 'reduce_sum':
      axes, last = equation.params['axes'], len(operands[0]) - 1
      # Over pixels or tokens, or of a softmax or layer norm.
      assert axes in (tuple(range(1, last)), (last,)), axes
      total += np.prod(operands[0]) if last not in axes else 0
  return int(total)


def assert_parts_make_the_cost(model, image_size, trunk_madds):
  """Holds every sub-network's costs in parts to a hand count of the trunks.

  Args:
    model: the supernet.
    image_size: side of the images.
    trunk_madds: the buckets' trunk's, and the widest network's.
  """
  trunks = []
  for subnet in model.sub_networks:
    trunk, branch = model.cost_in_parts(subnet, image_size)
    cost = model.cost(subnet, image_size)
    assert trunk.madds + branch.madds == cost.madds
    assert trunk.params + branch.params == cost.params
    assert branch.madds > 0 and isinstance(branch.madds, int)
    trunks.append(trunk)
  *buckets, widest = trunks
  assert len(set(buckets)) == 1
  assert (buckets[0].madds, widest.madds) == trunk_madds


def assert_zero_outside(arrays, slices):
  outside = {path: np.array(array) for path, array in arrays.items()}
  for path, index in slices.items():
    outside[path][index] = 0
  for path, array in outside.items():
    assert not array.any(), path


def assert_moved(after, before, rows):
  """The statistics at `rows` moved, all of them, and no other did."""
  for path, array in after.items():
    moved = np.zeros(array.shape, bool)
    if path in rows:
      moved[rows[path]] = True
    np.testing.assert_array_equal(array != before[path], moved, path)


class Comparison:
  """A supernet of random weights, beside its family's fixed network."""

  def __init__(self, model, network, images, seed=0):
    """Compiles nothing yet.

    Args:
      model: the supernet; its arrays are not used.
      network: (params, stats, images, blocks) to logits; `blocks` is what it
        cannot read off its weights, hashable.
      images: (N, H, W, 3).
      seed: of the weights.
    """
    self.model, self.network, self.images = model, network, images
    self.architecture = models.Architecture(model)
    self.variables = random_variables(model, seed)
    shape = (len(images), model.num_classes)
    self.weight = np.random.default_rng(1).normal(size=shape)
    self.weight = self.weight.astype(np.float32)

  def _slice(self, params, stats, subnet, momentum):
    """Logits of ours, and the statistics after."""
    model = self.architecture.bind(models.Variables(params, stats))
    logits = model(self.images, subnet, momentum=momentum)
    return logits, models.variables_of(model).batch_stats

  def _fixed(self, params, stats, blocks):
    return self.network(params, stats, self.images, blocks), {}

  def _run(self, forward, params, stats, has_gradient):
    """Logits, statistics after, and the gradient of a mix of the logits."""

    def loss(params, stats):
      logits, after = forward(params, stats)
      return (logits * self.weight).sum(), (logits, after)

    @jax.jit
    def run(params, stats):
      if not has_gradient:
        return *forward(params, stats), {}
      gradient, outputs = jax.grad(loss, has_aux=True)(params, stats)
      return *outputs, gradient

    return run(params, stats)

  def assert_equal(
    self,
    subnet,
    blocks,
    slices,
    rows,
    *,
    momentum=None,
    tolerance=1e-5,
    has_gradient=True,
  ):
    """Holds a sub-network to the fixed one that is cut out at `slices`.

    Logits, gradients within the slice, none outside of it, and which of the
    statistics moved: those at `rows`, in training. Compiling a gradient is
    nearly all the time that a test takes; `has_gradient=False` leaves it out.
    """
    params, stats = self.variables.params, self.variables.batch_stats
    logits, after, gradient = self._run(
      lambda *arrays: self._slice(*arrays, subnet, momentum),
      params,
      stats,
      has_gradient,
    )
    expected, _, expected_gradient = self._run(
      lambda *arrays: self._fixed(*arrays, blocks),
      cut(params, slices),
      cut(stats, rows) if momentum is None else None,
      has_gradient,
    )
    assert_close({'logits': logits}, {'logits': expected}, tolerance)
    assert_moved(after, stats, rows if momentum is not None else {})
    if has_gradient:
      assert_close(cut(gradient, slices), expected_gradient, tolerance)
      for path, array in expected_gradient.items():
        assert np.asarray(array).any(), path
      assert_zero_outside(gradient, slices)

  def assert_cost(self, subnet, blocks, slices, rows, image_size):
    """Holds a sub-network's cost to the fixed one's program and arrays."""
    params = cut(self.variables.params, slices)
    stats = cut(self.variables.batch_stats, rows)
    madds = count_madds(
      lambda images: self.network(params, stats, images, blocks),
      jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32),
    )
    cost = self.model.cost(subnet, image_size)
    assert cost.madds == madds
    assert cost.params == sum(array.size for array in params.values())
    assert isinstance(cost.madds, int) and isinstance(cost.params, int)
