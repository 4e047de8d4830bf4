"""A small network whose buckets and gate tell images apart."""

import jax.numpy as jnp
import numpy as np

import fixed
import micro
from ds_jax import models, routing


def make_images(count):
  generator = np.random.default_rng(2)
  # Of many colours, so that the gate tells them apart.
  colours = generator.integers(0, 200, (count, 1, 1, 3))
  noise = generator.integers(0, 56, (count, 8, 8, 3))
  return (colours + noise).astype(np.uint8)


def as_floats(images):
  return (jnp.asarray(images, jnp.float32) / 255 - 0.4) / 0.2


def make_model(images, **options):
  """A network whose buckets and gate tell these images apart."""
  model = models.create_abstract_model(**micro.MODEL, **options)
  variables = fixed.calibrated_variables(model, as_floats(images))
  params = dict(variables.params)
  params['classifier/kernel'] *= 5
  model = models.Architecture(model).bind(variables.replace(params=params))
  head = (
    model.slim.head if model.slim else model.stages[1][0].gate.slim
  ).kernel
  if model.slim is None:
    # No bucket is best for the mean image.
    features = model.trunk(as_floats(images))
    mean = model.stages[1][0].gate.reduced(features).mean(0)
    head[...] -= jnp.outer(mean, mean @ head[...]) / (mean @ mean)
  head[...] *= 5
  return model


def route(router, branches, gate_logits, features):
  """Routes features, with the gate's logits given."""
  network = routing.Network(lambda x: x, lambda x: gate_logits, branches)
  return routing.route(router, network, features)
