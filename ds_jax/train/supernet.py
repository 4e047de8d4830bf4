"""Stage I: one supernet whose sub-networks are all good.

Each step (DS-Net++, section 4.1) runs the widest network with cross-entropy to
the labels, and `n` random sub-networks and the narrowest with cross-entropy to
a teacher: the widest network of the exponential moving average (in-place
bootstrapping), for the narrowest optionally the mean of the average's widest
and random sub-networks (in-place ensemble bootstrapping). The gradients of all
passes are summed for one update.

With multi-view consistency (MvCo) every image comes in two views, augmented
independently: the teacher sees one, the students the other. The definition is
ours, since the paper's is not public.

With Mixup or CutMix (`ds_jax.train.mixing`) every micro-batch is mixed once,
before all passes, so that they see the same mixture; of two views, both alike.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import losses, mixing, optimizer


@flax.struct.dataclass
class SupernetState:
  """What a step changes.

  Attributes:
    variables: the network in training.
    network: its moving average: the teacher, and the phase's result so far.
    opt_state: Optax's.
  """

  variables: models.Variables
  network: models.Variables
  opt_state: optax.OptState


# Images, and labels or targets.
_ROWS = (parallel.BATCH, parallel.BATCH)


class Supernet:
  """Stage I as `init` and `step`; its result is `state.network`."""

  name = 'supernet'

  def __init__(
    self,
    config: config_lib.SupernetConfig,
    model,
    normalize,
    *,
    num_steps: int,
    steps_per_epoch: int,
    seed: int,
    executor: parallel.Executor,
    dataset: config_lib.DataConfig | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: the phase's numbers.
      model: the supernet; its arrays are not used.
      normalize: uint8 images to the model's floats.
      num_steps: how long.
      steps_per_epoch: for the warm-up.
      seed: of sub-network draws and dropout.
      executor: runs the passes on the devices.
      dataset: says how batches are mixed; None mixes none.

    Raises:
      ValueError: if the model has too few sub-networks for `num_random`.
    """
    self.config = config
    self.num_steps = num_steps
    self.seed = seed
    self.executor = executor
    self._mixed_as = dataset if dataset and dataset.mixes else None
    self._num_classes = model.num_classes
    self._architecture = models.Architecture(model)
    self._normalize = normalize
    self._narrowest, self._widest = model.narrowest, model.widest
    self._between = model.sub_networks[1:-1]
    needed = 1 if config.with_replacement else config.num_random
    if config.num_random and needed > len(self._between):
      raise ValueError(
        f'supernet.num_random={config.num_random}, but the model has only'
        f' {len(self._between)} sub-networks between narrowest and widest.'
      )
    self._schedule = optimizer.learning_rate_schedule(
      config.optimizer, num_steps, steps_per_epoch
    )
    self._optimizer = optimizer.make_optimizer(
      config.optimizer, self._schedule, frozen=models.is_slimming
    )
    self._compile()

  def _compile(self):
    compile = self.executor.compile
    variables = models.Variables(parallel.STATE, parallel.SUM)
    self._mix = compile(
      self._mixed_batch, [parallel.BATCH, parallel.WHOLE], parallel.BATCH
    )
    self._teach = compile(
      self._soft_targets,
      [parallel.STATE, parallel.BATCH],
      parallel.BATCH,
      static=['subnet'],
    )
    self._widest_gradient = compile(
      self._widest_pass,
      [variables, *_ROWS, parallel.WHOLE, parallel.SUM],
      (parallel.SUM, parallel.SUM, parallel.WHOLE),
    )
    self._student_gradient = compile(
      self._student_pass,
      [variables, *_ROWS, parallel.SUM],
      (parallel.SUM, parallel.SUM, parallel.WHOLE),
      static=['subnet'],
      donate=[3],
    )
    self._update = compile(
      self._apply_gradient,
      [
        SupernetState(variables, parallel.STATE, parallel.STATE),
        parallel.SUM,
        parallel.WHOLE,
      ],
      (parallel.STATE, parallel.WHOLE),
      donate=[0],
    )
    self._init_optimizer = compile(
      self._optimizer.init, [parallel.STATE], parallel.STATE
    )

  def init(self, variables: models.Variables) -> SupernetState:
    """Returns the state before the first step."""
    network = self.executor.put(variables)
    variables = self.executor.put(variables)
    opt_state = self._init_optimizer(variables.params)
    return SupernetState(variables, network, opt_state)

  def step(self, state: SupernetState, batch, step: int):
    """Runs one update.

    Args:
      state: donated.
      batch: this process's `images` (n, H, W, 3) uint8 and `labels` (n,); with
        `multi_view` also `teacher_images`, the other view.
      step: how many came before.

    Returns:
      The new state and scalar metrics, both still on their way.
    """
    subnets = self.draw(step)
    micro_batches = self.config.accumulation_steps
    parts = {k: np.split(v, micro_batches) for k, v in batch.items()}
    gradient = None
    batch_stats = self.executor.spread(state.variables.batch_stats)
    all_metrics = []
    for i in range(micro_batches):
      part = {name: array[i] for name, array in parts.items()}
      part = self.executor.put_batch(part)
      variables = state.variables.replace(batch_stats=batch_stats)
      key = jax.random.fold_in(
        jax.random.key(self.seed), step * micro_batches + i
      )
      if self._mixed_as:
        part = self._mix(part, key)
      gradient, batch_stats, metrics = self.gradient(
        variables, state.network, part, subnets, key, gradient
      )
      all_metrics.append(metrics)
    state, update_metrics = self._update(
      state.replace(variables=state.variables.replace(batch_stats=batch_stats)),
      gradient,
      np.int32(step),
    )
    metrics = all_metrics[0]
    if micro_batches > 1:
      metrics = jax.tree.map(lambda *m: sum(m) / micro_batches, *all_metrics)
    return state, {**metrics, **update_metrics}

  def draw(self, step: int) -> list[models.Subnet]:
    """Returns the step's random sub-networks, the same on every process."""
    return draw(
      self._between,
      self.config.num_random,
      self.seed,
      step,
      with_replacement=self.config.with_replacement,
    )

  def gradient(self, variables, teacher, batch, subnets, key, gradient=None):
    """Sums the gradients of the widest, `subnets` and the narrowest.

    Args:
      variables: the students.
      teacher: the variables whose widest network the others learn from.
      batch: sharded, as in `step`; or mixed, with labels (N, C).
      subnets: the random sub-networks, in the order in which they run.
      key: for dropout.
      gradient: what to add to; None means zero.

    Returns:
      The gradient, the batch statistics after all passes, and the losses.
    """
    images, labels = batch['images'], batch['labels']
    seen = batch['teacher_images'] if self.config.multi_view else images
    targets = self._teach(teacher, seen, subnet=self._widest)
    gradient, batch_stats, metrics = self._widest_gradient(
      variables, images, labels, key, gradient
    )
    teachers = [targets]
    for subnet in (*subnets, self._narrowest):
      if self.config.ensemble and subnet is self._narrowest:
        targets = sum(teachers) / len(teachers)
      variables = variables.replace(batch_stats=batch_stats)
      gradient, batch_stats, loss = self._student_gradient(
        variables, images, targets, gradient, subnet=subnet
      )
      metrics[f'loss/{subnet.index}'] = loss
      if self.config.ensemble and subnet is not self._narrowest:
        teachers.append(self._teach(teacher, seen, subnet=subnet))
    return gradient, batch_stats, metrics

  def _mixed_batch(self, batch, key):
    views = {name: x for name, x in batch.items() if name != 'labels'}
    views, labels = mixing.mix(
      key,
      views,
      batch['labels'],
      self._mixed_as,
      self._num_classes,
      self.executor.reversed_rows,
    )
    return {**views, 'labels': labels}

  def _soft_targets(self, teacher, images, subnet):
    model = self._architecture.bind(self.executor.whole(teacher))
    return jax.nn.softmax(model(self._normalize(images), subnet))

  def _widest_pass(self, variables, images, labels, key, gradient):
    def loss_fn(logits):
      return losses.cross_entropy(logits, labels, self.config.label_smoothing)

    loss, logits, new, batch_stats = self._gradient(
      variables, images, self._widest, loss_fn, key
    )
    if gradient is not None:
      new = jax.tree.map(jnp.add, gradient, new)
    metrics = {
      'loss/widest': loss,
      'accuracy': (logits.argmax(-1) == losses.dominant(labels)).mean(),
    }
    return new, batch_stats, self.executor.mean(metrics)

  def _student_pass(self, variables, images, targets, gradient, subnet):
    def loss_fn(logits):
      return losses.soft_cross_entropy(logits, targets)

    loss, _, new, batch_stats = self._gradient(
      variables, images, subnet, loss_fn
    )
    gradient = jax.tree.map(jnp.add, gradient, new)
    return gradient, batch_stats, self.executor.mean(loss)

  def _gradient(self, variables, images, subnet, loss_fn, key=None):
    images = self._normalize(images)
    if key is not None:
      key = self.executor.key_of_replica(key)

    def forward(params):
      whole = self.executor.whole(variables.replace(params=params))
      model = self._architecture.bind(whole)
      logits = model(images, subnet, momentum=self.config.momentum, rng=key)
      batch_stats = models.variables_of(model).batch_stats
      return loss_fn(logits), (logits, batch_stats)

    (loss, (logits, batch_stats)), gradient = jax.value_and_grad(
      forward, has_aux=True
    )(variables.params)
    return loss, logits, gradient, batch_stats

  def _apply_gradient(self, state, gradient, step):
    # The only place where the replicas meet.
    gradient, batch_stats = self.executor.mean(
      (gradient, state.variables.batch_stats)
    )
    if self.config.accumulation_steps > 1:
      share = 1 / self.config.accumulation_steps
      gradient = jax.tree.map(lambda g: g * share, gradient)
    params = state.variables.params
    updates, opt_state = self._optimizer.update(
      gradient, state.opt_state, params
    )
    params = optax.apply_updates(params, updates)
    variables = models.Variables(params, batch_stats)
    network = optimizer.moving_average(
      variables,
      state.network,
      self.config.ema_decay,
      step,
      warms_up=self.config.ema_warmup,
    )
    metrics = {
      'learning_rate': self._schedule(step),
      'gradient_norm': optax.tree.norm(gradient),
      'parameter_norm': optax.tree.norm(variables.params),
    }
    return SupernetState(variables, network, opt_state), metrics


def draw(
  subnets: Sequence[models.Subnet],
  count: int,
  seed: int,
  step: int,
  *,
  with_replacement: bool = False,
) -> list[models.Subnet]:
  """Draws sub-networks for a step, the widest first.

  Args:
    subnets: to draw from, narrowest first.
    count: how many.
    seed: of the run, below 2^32.
    step: of Stage I.
    with_replacement: whether one may be drawn again.
  """
  # RandomState's stream is frozen for good; default_rng's is not.
  stream = np.random.RandomState((seed, step))
  if with_replacement:
    picks = stream.randint(len(subnets), size=count)
  else:
    picks = stream.permutation(len(subnets))[:count]
  return [subnets[i] for i in sorted(picks, reverse=True)]
