"""What a network computes of its weights alone, done once.

A sub-network slices its weights, casts them, and turns batch statistics into
scales, in every call. For a large batch that is little, but not for one image
on a CPU, where copying a slice takes about as long as using it. `split` cuts a
function in two: what needs the weights alone, and the rest.

What is a vector (of norms and biases, more than half of the arrays) goes into
one array for each dtype: on CPUs and GPUs every argument of a call takes time,
and a slice of a vector next to none.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
  from jax.extend import core
except ImportError:  # `split` then says so.
  core = None

Pytree = Any

# Broadcasting costs little, and may be to the batch's size; the platform is
# the one that the call is lowered for.
_STAY = ('broadcast_in_dim', 'platform_index')


class PreparationError(Exception):
  """This JAX traces to something else than what can be cut here."""


@dataclasses.dataclass(frozen=True)
class Split:
  """A function of weights and an input, in two steps.

  Attributes:
    prepare: weights to a list of arrays, of shapes that the input's batch has
      no part in.
    run: such a list and the input to the result.
  """

  prepare: Callable[[Pytree], list[jax.Array]]
  run: Callable[[list[jax.Array], Pytree], Pytree]


def split(
  function: Callable[[Pytree, Pytree], Pytree],
  weights: Pytree,
  x: Pytree,
) -> Split:
  """Traces `function(weights, x)` and cuts it in two.

  Args:
    function: pure; its result must be an array that depends on x.
    weights: arrays, or `jax.ShapeDtypeStruct`s.
    x: the input, arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    PreparationError: if jaxprs are not as they are in JAX 0.10 to 0.12, which
      no release promises.
  """
  closed = jax.make_jaxpr(function)(weights, x)
  try:
    return _cut(closed, len(jax.tree.leaves(weights)))
  # Which one depends on what changed.
  except Exception as error:
    raise PreparationError(
      f'JAX {jax.__version__}: {type(error).__name__}: {error}'
    ) from error


def _cut(closed, num_weights: int) -> Split:
  jaxpr = closed.jaxpr
  known_inputs = jaxpr.invars[:num_weights]
  inputs = jaxpr.invars[num_weights:]
  moving = set(inputs)
  known, rest = [], []
  for equation in jaxpr.eqns:
    moves = equation.primitive.name in _STAY or any(
      v in moving for v in equation.invars if _is_variable(v)
    )
    (rest if moves else known).append(equation)
    if moves:
      moving.update(equation.outvars)
  needed = {
    v
    for equation in rest
    for v in equation.invars
    if _is_variable(v) and v not in moving and v not in jaxpr.constvars
  }
  made = [*known_inputs, *(v for e in known for v in e.outvars)]
  residuals = [v for v in made if v in needed]
  residuals.sort(key=_vector_dtype)
  packs = [
    [v.aval.shape for v in group]
    for dtype, group in itertools.groupby(residuals, _vector_dtype)
    if dtype
  ]
  num_vectors = sum(len(shapes) for shapes in packs)
  prepare = _as_function(closed, known_inputs, known, residuals)
  run = _as_function(closed, [*residuals, *inputs], rest, jaxpr.outvars)

  def prepare_packed(weights):
    made = prepare(*jax.tree.leaves(weights))
    vectors = iter(made[-num_vectors:] if num_vectors else ())
    packed = [
      jnp.concatenate([next(vectors).reshape(-1) for _ in shapes])
      for shapes in packs
    ]
    return [*made[: len(made) - num_vectors], *packed]

  def run_packed(prepared, x):
    alone = prepared[: len(prepared) - len(packs)]
    vectors = []
    for pack, shapes in zip(prepared[len(alone) :], packs, strict=True):
      sizes = [math.prod(shape) for shape in shapes]
      ends = itertools.accumulate(sizes)
      for shape, size, end in zip(shapes, sizes, ends, strict=True):
        vector = jax.lax.slice(pack, (end - size,), (end,))
        vectors.append(vector.reshape(shape))
    return run(*alone, *vectors, *jax.tree.leaves(x))[0]

  return Split(prepare_packed, run_packed)


def _vector_dtype(variable) -> str:
  """The dtype of what has one axis longer than 1; of other arrays ''."""
  shape = variable.aval.shape
  is_vector = shape and max(shape) == variable.aval.size
  return str(variable.aval.dtype) if is_vector else ''


def _as_function(closed, inputs, equations, outputs):
  part = closed.jaxpr.replace(
    invars=list(inputs), eqns=list(equations), outvars=list(outputs),
    **_unnamed(closed.jaxpr),
  )  # fmt: skip
  return core.jaxpr_as_fun(core.ClosedJaxpr(part, closed.consts))


def _unnamed(jaxpr) -> dict[str, Any]:
  """Returns debug info that names no inputs, where this JAX has it.

  That of the whole names inputs that a part does not have.
  """
  info = getattr(jaxpr, 'debug_info', None)
  if not hasattr(info, 'with_unknown_names'):
    return {}
  return {'debug_info': info.with_unknown_names()}


def _is_variable(atom) -> bool:
  return not isinstance(atom, core.Literal)
