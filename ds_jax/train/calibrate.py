"""Between the stages: batch-norm statistics of every sub-network, anew.

Weights are frozen. Every row of statistics becomes the mean over
`num_batches` training batches of the batch's own mean and (unbiased) variance,
with the moving average's weights, which no statistics have seen in training.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ds_jax import models
from ds_jax.train import mesh


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
  """Calibration.

  Attributes:
    num_batches: how many training batches.
  """

  num_batches: int = 50


class Calibrate:
  """Calibration as `init`, `step` and `finish`."""

  name = 'calibrate'

  def __init__(self, config: CalibrateConfig, model, normalize, *, mesh):
    """Compiles nothing yet; see `Supernet` for the arguments."""
    self.num_steps = config.num_batches
    self.mesh = mesh
    self._architecture = models.Architecture(model)
    self._normalize = normalize
    self._calibrate = self._compile()

  def _compile(self):
    return jax.jit(self._calibrate_, out_shardings=mesh.replicated(self.mesh))

  def init(self, variables: models.Variables) -> models.Variables:
    """Returns the state before the first step."""
    return mesh.replicate(self.mesh, variables)

  def step(self, state: models.Variables, batch, step: int):
    """Takes one batch into the running mean; see `Supernet.step`."""
    images = mesh.shard_batch(self.mesh, batch['images'])
    momentum = jnp.float32(1 / (step + 1))
    batch_stats = self._calibrate(state, images, momentum)
    return state.replace(batch_stats=batch_stats), {}

  def finish(self, state: models.Variables) -> models.Variables:
    """Returns the calibrated network."""
    return state

  def _calibrate_(self, variables, images, momentum):
    images = self._normalize(images)
    model = self._architecture.bind(variables)
    # Each row is moved once: the trunk's for all buckets together.
    features = model.trunk(images, momentum=momentum)
    for subnet in model.routing_space:
      model.branch(features, subnet, momentum=momentum)
    if model.widest not in model.routing_space:
      model(images, model.widest, momentum=momentum)
    return models.variables_of(model).batch_stats
