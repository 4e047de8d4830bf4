"""After Stage II: what every bucket and the gate say of images held out.

Nothing is trained. From these outcomes, which the checkpoint keeps, a router
for any budget is made in a moment; see `routing.budget`.

Axes: M images held out, with those that fill up the last batch; K buckets.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import models, parallel, routing


@flax.struct.dataclass
class BudgetState:
  """What a step changes.

  Attributes:
    network: the trained network.
    outcomes: of M images; zeros where no batch has come yet.
    mask: (M,) bool, False where there is no image.
  """

  network: models.Variables
  outcomes: routing.Outcomes
  mask: jax.Array


class Budget:
  """The sweep as `init` and `step`, a batch a step."""

  name = 'budget'

  def __init__(
    self,
    model,
    normalize,
    *,
    executor: parallel.Executor,
    num_steps: int,
    batch_size: int,
  ):
    """Compiles nothing yet.

    Args:
      model: the supernet; its arrays are not used.
      normalize: uint8 images to the model's floats.
      executor: runs the step on the devices.
      num_steps: how many batches there are; 0 leaves the stage out.
      batch_size: images in a global batch.
    """
    self.num_steps = num_steps
    self.executor = executor
    self._batch_size = batch_size
    self._model = model
    self._architecture = models.Architecture(model)
    self._normalize = normalize
    self._step = executor.compile(
      self._observe_batch,
      [parallel.STATE] * 3 + [parallel.BATCH, parallel.WHOLE],
      (parallel.STATE, parallel.STATE, parallel.WHOLE),
      donate=[1, 2],
    )

  def init(self, variables: models.Variables) -> BudgetState:
    """Returns the state before the first step."""
    num_images = self.num_steps * self._batch_size
    empty = routing.empty_outcomes(
      num_images, len(self._model.routing_space), self._model.num_classes
    )
    state = BudgetState(variables, empty, np.zeros(num_images, bool))
    return self.executor.put(state)

  def step(self, state: BudgetState, batch, step: int):
    """Adds one batch's outcomes; see `Supernet.step`."""
    batch = self.executor.put_batch(batch)
    outcomes, mask, right = self._step(
      state.network, state.outcomes, state.mask, batch, np.int32(step)
    )
    state = state.replace(outcomes=outcomes, mask=mask)
    return state, {'right/narrowest': right[0], 'right/last': right[-1]}

  def _observe_batch(self, network, outcomes, mask, batch, step):
    model = self._architecture.bind(self.executor.whole(network))
    features = model.trunk(self._normalize(batch['images']))
    logits = [model.branch(features, s) for s in model.routing_space]
    seen = routing.observe(
      model.gate_logits(features), jnp.stack(logits, 1), batch['labels']
    )
    seen, new_mask = self.executor.all_rows((seen, batch['mask']))

    def place(array, rows):
      start = (step * self._batch_size, *(0 for _ in array.shape[1:]))
      return jax.lax.dynamic_update_slice(array, rows, start)

    weights = new_mask / new_mask.sum()
    return (
      jax.tree.map(place, outcomes, seen),
      place(mask, new_mask),
      weights @ seen.right,
    )
