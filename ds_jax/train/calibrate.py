"""Between the stages: batch-norm statistics of every sub-network, anew.

Weights are frozen. Every row of statistics becomes the mean over
`num_batches` training batches of the batch's own mean and (unbiased) variance,
with the moving average's weights, which no statistics have seen in training.
With `momentum` it is a moving average of them instead. The batch is the global
one, whatever executor trains.
"""

import dataclasses

import flax.struct
import numpy as np
import optax

from ds_jax import models, parallel, validation


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
  """Calibration.

  Attributes:
    num_batches: how many training batches.
    momentum: the batch's share in the running statistics, which start from the
      first batch's; None gives all batches the same.
  """

  num_batches: int = 50
  momentum: float | None = None

  def __post_init__(self):
    validation.check_range('num_batches', self.num_batches, low=1)
    if self.momentum is not None:
      validation.check_range('momentum', self.momentum, above=0, high=1)


@flax.struct.dataclass
class CalibrateState:
  """What a step changes.

  Attributes:
    network: its statistics are the mean over the batches so far.
  """

  network: models.Variables


class Calibrate:
  """Calibration as `init` and `step`; its result is `state.network`."""

  name = 'calibrate'

  def __init__(
    self,
    config: CalibrateConfig,
    model,
    normalize,
    *,
    executor: parallel.Executor,
  ):
    """Compiles nothing yet; see `Supernet` for the arguments."""
    # A network without batch norms has nothing to calibrate.
    has_statistics = models.variables_of(model).batch_stats
    self.config = config
    self.num_steps = config.num_batches if has_statistics else 0
    # Replicas would know nothing of how their images differ from the others'.
    self.executor = executor.united()
    self._architecture = models.Architecture(model)
    self._normalize = normalize
    self._calibrate = self.executor.compile(
      self._move_statistics,
      [parallel.STATE, parallel.BATCH, parallel.WHOLE],
      (parallel.STATE, parallel.WHOLE),
    )

  def init(self, variables: models.Variables) -> CalibrateState:
    """Returns the state before the first step."""
    return CalibrateState(self.executor.put(variables))

  def step(self, state: CalibrateState, batch, step: int):
    """Takes one batch into the running mean; see `Supernet.step`."""
    images = self.executor.put_batch(batch['images'])
    momentum = np.float32(self._momentum(step))
    batch_stats, norm = self._calibrate(state.network, images, momentum)
    network = state.network.replace(batch_stats=batch_stats)
    return CalibrateState(network), {'statistics_norm': norm}

  def _momentum(self, step: int) -> float:
    if step and self.config.momentum is not None:
      return self.config.momentum
    return 1 / (step + 1)

  def _move_statistics(self, variables, images, momentum):
    images = self._normalize(images)
    model = self._architecture.bind(self.executor.whole(variables))
    # Each row is moved once: the trunk's for all buckets together.
    features = model.trunk(images, momentum=momentum)
    model.gate_logits(features, momentum)
    for subnet in model.sub_networks:
      if model.shares_trunk(subnet):
        model.branch(features, subnet, momentum=momentum)
      else:
        model(images, subnet, momentum=momentum)
    batch_stats = models.variables_of(model).batch_stats
    return batch_stats, optax.tree.norm(batch_stats)
