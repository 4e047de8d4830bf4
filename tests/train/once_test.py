"""In a training step nothing runs twice: products are counted."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

import micro
from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.nn import gate as nn_gate
from ds_jax.train import gate, supernet

MODEL = models.create_abstract_model(**micro.MODEL)
ARCHITECTURE = models.Architecture(MODEL)
VARIABLES = jax.eval_shape(lambda: models.variables_of(MODEL))
IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)
LABELS = jax.ShapeDtypeStruct((4,), jnp.int32)
OPTIMIZER = config_lib.OptimizerConfig(learning_rate=0.1)


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make(phase, config, **options):
  executor = parallel.Executor(devices=jax.devices()[:1])
  return phase(
    config, MODEL, normalize, num_steps=9, steps_per_epoch=9, seed=0,
    executor=executor, **options,
  )  # fmt: skip


@pytest.fixture(autouse=True)
def means_are_no_products(monkeypatch):
  monkeypatch.setattr(nn_gate, 'mean_of_pixels', lambda x: x.mean((1, 2)))


def products(function, *arguments) -> int:
  """How many products of matrices and dense convolutions there are."""
  return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      total += min(len(v.aval.shape) for v in equation.invars) > 1
    elif name == 'conv_general_dilated':
      # Not depthwise ones, which are there in two forms.
      groups = params['feature_group_count'], params['batch_group_count']
      total += groups == (1, 1)
    for value in jax.tree.leaves(
      params, is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(value, core.ClosedJaxpr):
        total += _count(value.jaxpr)
      elif isinstance(value, core.Jaxpr):
        total += _count(value)
  return total


def forward(subnet, momentum=None):
  def run(variables, images):
    model = ARCHITECTURE.bind(variables)
    return model(normalize(images), subnet, momentum=momentum)

  return products(run, VARIABLES, IMAGES)


@pytest.fixture(scope='module')
def stage_one():
  config = config_lib.SupernetConfig(
    num_epochs=1, optimizer=OPTIMIZER, num_random=1
  )
  return make(supernet.Supernet, config)


def test_a_pass_of_stage_i_runs_forward_and_backward_once(stage_one):
  targets = jax.ShapeDtypeStruct((4, 3), jnp.float32)
  for subnet in (*MODEL.routing_space, MODEL.widest):
    once = forward(subnet, momentum=0.1)
    assert once > 10
    # Backward, every product has two: for its input, and for its weights. The
    # images need no gradient; in one of the stem's two forms it is there, and
    # the compiler drops it.
    expected = 3 * once - 1
    if subnet == MODEL.widest:
      found = products(
        stage_one._widest_pass, VARIABLES, IMAGES, LABELS,
        jax.random.key(0), VARIABLES.params,
      )  # fmt: skip
    else:

      def run(variables, images, targets, gradient, subnet=subnet):
        return stage_one._student_pass(
          variables, images, targets, gradient, subnet
        )

      found = products(run, VARIABLES, IMAGES, targets, VARIABLES.params)
    assert found == expected


def test_the_teacher_runs_forward_alone(stage_one):
  def teach(variables, images):
    return stage_one._soft_targets(variables, images, MODEL.widest)

  assert products(teach, VARIABLES, IMAGES) == forward(MODEL.widest)


def test_stage_ii_runs_the_trunk_once_and_nothing_backward():
  # Its loss holds no products of its own.
  config = config_lib.GateConfig(
    num_epochs=1, optimizer=OPTIMIZER, target='correctness'
  )
  phase = make(gate.Gate, config, image_size=8)
  model = models.create_model(**micro.MODEL)
  state = phase.init(models.variables_of(model))
  found = products(phase._update_head, state, IMAGES, LABELS, jnp.int32(0))

  def parts(variables, images):
    model = ARCHITECTURE.bind(variables)
    features = model.trunk(normalize(images))
    return [model.branch(features, s) for s in MODEL.routing_space]

  everything = products(parts, VARIABLES, IMAGES)
  # The head: its reduction and the logits, once each, and the logits' two
  # gradients, of which the compiler drops the input's; and once as it was
  # before, whose answer it drops, too.
  assert found == everything + 6
