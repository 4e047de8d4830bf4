"""A function cut in two gives what the whole one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import micro
from ds_jax import models
from ds_jax.inference import preparation


def test_what_needs_the_weights_alone_is_computed_once():
  def function(weights, x):
    scale = jnp.exp(weights['a'][:2]) * 2
    return x @ weights['b'] * scale + weights['c'][0]

  rng = np.random.default_rng(0)
  weights = {
    'a': rng.normal(size=5),
    'b': rng.normal(size=(3, 2)),
    'c': rng.normal(size=4),
  }
  x = jax.ShapeDtypeStruct((3,), jnp.float32)
  split = preparation.split(function, weights, x)
  prepared = jax.jit(split.prepare)(weights)
  # A number, the kernel as it is, and the one vector.
  assert [np.shape(array) for array in prepared] == [(3, 2), (), (2,)]
  rest = jax.make_jaxpr(split.run)(prepared, x)
  names = {equation.primitive.name for equation in rest.eqns}
  assert 'exp' not in names and 'dot_general' in names
  x = rng.normal(size=3).astype(np.float32)
  expected = x @ weights['b'] * np.exp(weights['a'][:2]) * 2 + weights['c'][0]
  np.testing.assert_allclose(split.run(prepared, x), expected, rtol=1e-5)


def test_an_error_of_the_function_is_its_own():
  def function(weights, x):
    return x @ weights

  x = jax.ShapeDtypeStruct((3,), jnp.float32)
  with pytest.raises(TypeError, match='dot_general'):
    preparation.split(function, np.zeros((4, 2), np.float32), x)


def test_prepared_weights_serve_every_batch_size():
  model = models.create_model(**micro.MODEL)
  architecture = models.Architecture(model)
  variables = models.variables_of(model)
  subnet = model.routing_space[1]

  def run(variables, x):
    return architecture.bind(variables)(x, subnet)

  one = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  split = preparation.split(run, variables, one)
  prepared = jax.jit(split.prepare)(variables)
  x = jax.random.normal(jax.random.key(0), (5, 8, 8, 3))
  split = preparation.split(run, variables, x)
  logits = jax.jit(split.run)(prepared, x)
  expected = jax.jit(run)(variables, x)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'name', ['ds_mobilenet_pp', 'ds_resnet50', 'ds_vit_s16']
)
def test_no_slice_of_a_weight_is_left(name):
  model = models.create_abstract_model(name, dtype='bfloat16')
  architecture = models.Architecture(model)
  variables = jax.eval_shape(lambda: models.variables_of(model))
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def run(variables, x):
    return architecture.bind(variables)(x, model.narrowest)

  split = preparation.split(run, variables, x)
  prepared = jax.eval_shape(split.prepare, variables)
  narrow = model.cost(model.narrowest, 224).params
  size = sum(array.size for array in prepared)
  # Parameters and, of batch norms, scale and shift for mean and variance.
  assert narrow <= size <= 1.02 * narrow
  rest = jax.make_jaxpr(split.run)(prepared, x).jaxpr
  # Of the vectors' packs, one for each dtype, there are slices.
  arguments = {v for v in rest.invars[: len(prepared)] if v.aval.ndim > 1}
  packs = [v.aval for v in rest.invars[: len(prepared)] if v not in arguments]
  assert all(pack.ndim == 1 for pack in packs)
  assert len({pack.dtype for pack in packs}) == len(packs)
  for equation in rest.eqns:
    if equation.primitive.name in ('slice', 'convert_element_type'):
      assert not arguments & set(equation.invars)
