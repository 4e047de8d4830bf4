"""Swish and its gradient against NumPy, and what the gradient keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.nn import activation


def numpy_swish(x):
  x = np.asarray(x, np.float64)
  return x / (1 + np.exp(-x))


def numpy_gradient(x):
  step = 1e-6
  x = np.asarray(x, np.float64)
  return (numpy_swish(x + step) - numpy_swish(x - step)) / (2 * step)


# Of one rounding: a bfloat16 has eight bits. Values reach 20, gradients 2.2,
# with some four roundings on the way.
@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(jnp.float32, 2**-20), (jnp.bfloat16, 2**-8)]
)
def test_swish_and_its_gradient_equal_numpy(dtype, tolerance):
  x = jnp.linspace(-20, 20, 401).astype(dtype)
  y, pull = jax.vjp(activation.swish, x)
  (dx,) = pull(jnp.full_like(x, 2))
  assert y.dtype == dx.dtype == dtype
  expected = numpy_swish(x)
  np.testing.assert_allclose(
    np.asarray(y, np.float64), expected, rtol=0, atol=tolerance * 20
  )
  np.testing.assert_allclose(
    np.asarray(dx, np.float64),
    2 * numpy_gradient(x),
    rtol=0,
    atol=tolerance * 2.2 * 4,
  )


def test_gradient_is_finite_where_the_sigmoid_is_not_representable():
  x = jnp.asarray([-1e4, -200.0, 200.0, 1e4])
  gradient = jax.vmap(jax.grad(activation.swish))(x)
  np.testing.assert_array_equal(gradient, [0, 0, 1, 1])


def test_gradient_keeps_the_input_alone():
  x = jnp.ones((3, 5))
  _, pull = jax.vjp(activation.swish, x)
  assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [x.shape]


def test_compiled_gradient_computes_the_sigmoid_again():
  """Else the compiler would keep that of the forward pass in memory."""

  def loss(x):
    return (activation.swish(x) ** 2).sum()

  compiled = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones(64)).compile()
  assert compiled.as_text().count(' exponential(') == 2
