"""Between the phases: the batch-norm statistics of every sub-network.

Weights are frozen. Every row of statistics becomes the mean over
`num_batches` training batches of the batch's own mean and (unbiased) variance,
with the moving average's weights, which no statistics have seen in training.
With `momentum` it is a moving average of them instead. The batch is the global
one, whatever executor trains.
"""

import flax.struct
import numpy as np
import optax

from ds_jax import config as config_lib
from ds_jax import models, parallel


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
    config: config_lib.CalibrateConfig,
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
    model = self._architecture.bind(self.executor.whole(variables))
    # Each row is moved once: the trunk's for all buckets together.
    model.all_buckets(
      self._normalize(images), model.sub_networks, momentum=momentum
    )
    batch_stats = models.variables_of(model).batch_stats
    return batch_stats, optax.tree.norm(batch_stats)
