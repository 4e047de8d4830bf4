"""Times training steps and their parts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import compiler, data, models, parallel
from ds_jax import config as config_lib
from ds_jax.benchmark import timing
from ds_jax.train import gate, supernet

# A small product is too short for other machines than a CPU.
_MATMUL_SIZES = {'cpu': 2048}
_MATMUL_SIZE = 8192
_MANY_STEPS = 10**6


def matmul_ways(dtype: str) -> list[timing.Way]:
  """The machine's own rate, that all others are a share of."""
  size = _MATMUL_SIZES.get(jax.default_backend(), _MATMUL_SIZE)
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  call = functools.partial(jax.jit(jnp.matmul), a, a)
  return [timing.Way('matmul', f'{size}', 1, size**3, call)]


def training_ways(model, image_size: int, batch_size: int) -> list[timing.Way]:
  """The widest network, with its gradient too; steps of Stages I and II."""
  variables = models.variables_of(model)
  architecture = models.Architecture(model)
  batch = _batch(image_size, batch_size)
  images = jax.jit(_normalize)(batch['images'])
  widest = model.cost(model.widest, image_size).madds

  def loss(params, batch_stats, images):
    bound = architecture.bind(models.Variables(params, batch_stats))
    logits = bound(images, model.widest, momentum=0.1)
    return (logits**2).mean(), models.variables_of(bound).batch_stats

  def forward(variables, images):
    return architecture.bind(variables)(images, model.widest)

  options = compiler.options_for_training()
  gradient = jax.jit(
    jax.value_and_grad(loss, has_aux=True), compiler_options=options
  )
  arguments = (variables.params, variables.batch_stats, images)
  forward = functools.partial(
    jax.jit(forward, compiler_options=options), variables, images
  )
  first, phase_madds = _supernet_step(model, image_size, batch)
  programs = {
    'widest, forward': (forward, widest),
    'widest, gradient': (functools.partial(gradient, *arguments), 3 * widest),
    'Stage I step': (first, phase_madds),
    'Stage II step': (_gate_step(model, image_size, batch), 0),
  }
  return [
    timing.Way('training', name, batch_size, madds, call)
    for name, (call, madds) in programs.items()
  ]


def training_ratios(rows: Sequence[timing.Row]) -> dict[str, float]:
  """Returns the gradient's time over the forward pass's."""
  (ratio,) = timing.ratio(rows, 'widest, gradient', 'widest, forward').values()
  return {'gradient_over_forward': ratio}


def _supernet_step(model, image_size, batch):
  options = config_lib.SupernetConfig(
    num_epochs=1,
    optimizer=_OPTIMIZER,
    num_random=min(2, len(model.sub_networks) - 2),
  )
  phase, step = _step_of(supernet.Supernet, options, model, batch)
  students = [model.widest, *phase.draw(0), model.narrowest]
  madds = [model.cost(s, image_size).madds for s in students]
  # The teacher is the widest network, forward.
  return step, madds[0] + 3 * sum(madds)


def _gate_step(model, image_size, batch):
  options = config_lib.GateConfig(num_epochs=1, optimizer=_OPTIMIZER)
  _, step = _step_of(gate.Gate, options, model, batch, image_size=image_size)
  return step


def _step_of(make, options, model, batch, **more):
  """Returns a phase, and a function that runs its next step."""
  phase = make(
    options, model, _normalize, num_steps=_MANY_STEPS,
    steps_per_epoch=_MANY_STEPS, seed=0,
    executor=parallel.Executor(devices=jax.devices()[:1]), **more,
  )  # fmt: skip
  state = phase.init(_copy(models.variables_of(model)))

  def step():
    nonlocal state
    # The same draw every time, so that everything is compiled once.
    state, metrics = phase.step(state, batch, 0)
    return metrics

  return phase, step


_OPTIMIZER = config_lib.OptimizerConfig(name='sgd', learning_rate=1e-3)


def _normalize(images):
  return data.normalize(images, mean=(0.5,) * 3, std=(0.25,) * 3)


def _copy(tree):
  # Steps donate what they are given.
  return jax.tree.map(jnp.copy, tree)


def _batch(image_size, batch_size):
  rng = np.random.default_rng(0)
  shape = (batch_size, image_size, image_size, 3)
  return {
    'images': rng.integers(0, 256, shape).astype(np.uint8),
    'labels': rng.integers(0, 3, batch_size).astype(np.int32),
  }
