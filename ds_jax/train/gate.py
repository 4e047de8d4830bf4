"""Stage II: the slimming head learns to route; everything else is frozen.

Axes: N batch, K buckets, C classes.

The trunk and every bucket's branch run forward once, without gradient, and
give logits z_k. The target `sandwich` is the paper's (DS-Net++, section 4.2): a
straight-through Gumbel one-hot g of the gate's logits mixes the branches, `z =
sum_k g_k z_k`, and

    loss = a * CE(gate logits, SGS label) + b * CE(z, label) + MAdds term

The MAdds term is the paper's `c * (mean MAdds / unit)^2`, or, where a
`target_madds` is stated, `price * mean MAdds / widest MAdds`. The price moves
with the difference between what the gate would spend at inference (argmax, no
noise) and the target: dual ascent, damped as in an augmented Lagrangian. It is
negative where the gate spends too little, as it does without it: SGS labels are
so unbalanced on a trained network that the argmax is always the first bucket.

The target `correctness` is ours: each gate logit learns the probability that
its bucket gives the image's label,

    loss = mean_k BCE(gate logit k, softmax(z_k)[label])

and what to spend is settled afterwards, by a price on images that no phase has
seen (see `routing.budget`).

Of a batch mixed by Mixup or CutMix (`ds_jax.train.mixing`) the routed output
learns both labels; what is right, and `label`'s probability, go by the one with
the larger share.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import losses, mixing, optimizer


@flax.struct.dataclass
class GateState:
  """What a step changes, and the frozen network beside it.

  Attributes:
    network: the phase's result so far: the frozen network, with the moving
      average of `head` as its slimming head.
    head: the slimming head in training.
    opt_state: Optax's.
    price: of MAdds, in units of the loss per widest bucket's MAdds.
  """

  network: models.Variables
  head: models.Arrays
  opt_state: optax.OptState
  price: jax.Array


class Gate:
  """Stage II as `init` and `step`; its result is `state.network`."""

  name = 'gate'

  def __init__(
    self,
    config: config_lib.GateConfig,
    model,
    normalize,
    *,
    image_size: int,
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
      image_size: for MAdds.
      num_steps: how long.
      steps_per_epoch: for the warm-up.
      seed: of the Gumbel noise.
      executor: runs the step on the devices.
      dataset: says how batches are mixed, if the config augments images; None
        mixes none.

    Raises:
      ValueError: if `target_madds` is out of the routing space's reach.
    """
    self.config = config
    self.num_steps = num_steps
    self.seed = seed
    self.executor = executor
    mixes = dataset and dataset.mixes and config.is_augmented
    self._mixed_as = dataset if mixes else None
    self._num_classes = model.num_classes
    self._architecture = models.Architecture(model)
    self._normalize = normalize
    # Not integers: those of a large network overflow JAX's 32 bits.
    self._madds = [
      float(model.cost(s, image_size).madds) for s in model.routing_space
    ]
    _check_target(config.target_madds, self._madds)
    self._schedule = optimizer.learning_rate_schedule(
      config.optimizer, num_steps, steps_per_epoch
    )
    self._optimizer = optimizer.make_optimizer(config.optimizer, self._schedule)
    self._step = executor.compile(
      self._update_head,
      [parallel.STATE, parallel.BATCH, parallel.BATCH, parallel.WHOLE],
      (parallel.STATE, parallel.WHOLE),
      donate=[0],
    )
    self._init_optimizer = executor.compile(
      self._optimizer.init, [parallel.STATE], parallel.STATE
    )

  def init(self, variables: models.Variables) -> GateState:
    """Returns the state before the first step."""
    put = self.executor.put
    network, head = put(variables), put(head_of(variables))
    opt_state = self._init_optimizer(head)
    return GateState(network, head, opt_state, put(np.float32(0)))

  def step(self, state: GateState, batch, step: int):
    """Runs one update; see `Supernet.step`."""
    batch = self.executor.put_batch(batch)
    return self._step(state, batch['images'], batch['labels'], np.int32(step))

  def _update_head(self, state, images, labels, step):
    if self._mixed_as:
      images, labels = self._mix(images, labels, step)
    features, logits = self._forward(state.network, images)
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    gradient, metrics = jax.grad(self._loss, has_aux=True)(
      state.head, state, features, logits, labels, key
    )
    gradient, metrics = self.executor.mean((gradient, metrics))
    updates, opt_state = self._optimizer.update(
      gradient, state.opt_state, state.head
    )
    head = optax.apply_updates(state.head, updates)
    average = optimizer.moving_average(
      head,
      head_of(state.network),
      self.config.ema_decay,
      step,
      warms_up=self.config.ema_warmup,
    )
    state = state.replace(
      network=_with_head(state.network, average),
      head=head,
      opt_state=opt_state,
      price=self._next_price(state.price, metrics, step),
    )
    return state, {
      **metrics,
      'price': state.price,
      'learning_rate': self._schedule(step),
      'gradient_norm': optax.tree.norm(gradient),
      'parameter_norm': optax.tree.norm(head),
    }

  def _mix(self, images, labels, step):
    return mixing.mix(
      jax.random.fold_in(jax.random.key(self.seed), step),
      images,
      labels,
      self._mixed_as,
      self._num_classes,
      self.executor.reversed_rows,
    )

  def _forward(self, network, images):
    """Returns the trunk's features and all buckets' logits (K, N, C)."""
    model = self._architecture.bind(self.executor.whole(network))
    answers = model.all_buckets(self._normalize(images))
    return answers.features, jnp.stack(answers.logits)

  def _loss(self, head, state, features, logits, labels, key):
    network = self.executor.whole(_with_head(state.network, head))
    model = self._architecture.bind(network)
    gate_logits = model.gate_logits(features)
    if self.config.target == 'correctness':
      return self._correctness_loss(gate_logits, logits, labels)
    return self._sandwich_loss(gate_logits, logits, labels, state.price, key)

  def _correctness_loss(self, gate_logits, logits, labels):
    labels = losses.dominant(labels)
    targets = losses.label_probability(logits, labels)
    loss = optax.sigmoid_binary_cross_entropy(gate_logits, targets.T).mean()
    correct = logits[0].argmax(-1) == labels
    return loss, {'loss/correctness': loss, 'easy': correct.mean()}

  def _sandwich_loss(self, gate_logits, logits, labels, price, key):
    config = self.config
    noise = self.executor.draw(jax.random.gumbel, key, gate_logits.shape)
    one_hot = losses.straight_through_gumbel(
      noise, gate_logits, config.temperature
    )
    # In full precision, so that a one-hot picks its logits exactly.
    routed = jnp.einsum('nk,knc->nc', one_hot, logits, precision='highest')
    correct = (logits.argmax(-1) == losses.dominant(labels)[None]).T
    targets = losses.sandwich_labels(correct, config.hard_images)
    everyone = self.executor.all_rows(targets)
    sandwich = losses.cross_entropy(
      self._sandwich_logits(gate_logits, noise),
      targets,
      config.label_smoothing,
      everyone if config.balances_labels else None,
    )
    task = losses.cross_entropy(routed, labels, config.label_smoothing)
    loss = config.sandwich_weight * sandwich + config.routed_weight * task
    madds = jnp.asarray(self._madds, jnp.float32)
    argmax_madds = self.executor.mean(madds[gate_logits.argmax(-1)].mean())
    loss += self._madds_term(one_hot, price, argmax_madds)
    metrics = {
      'loss/sandwich': sandwich,
      'loss/routed': task,
      'madds': argmax_madds,
      'easy': (targets == 0).mean(),
    }
    return loss, metrics

  def _sandwich_logits(self, gate_logits, noise):
    if not self.config.noised_sandwich:
      return gate_logits
    return jax.nn.softmax((gate_logits + noise) / self.config.temperature)

  def _madds_term(self, one_hot, price, argmax_madds):
    config = self.config
    madds = jnp.asarray(self._madds, jnp.float32)
    spent = jnp.dot(one_hot, madds, precision='highest').mean()
    if config.target_madds is None:
      # The square of the mean over all replicas, in value and in gradient.
      mean = jax.lax.stop_gradient(self.executor.mean(spent))
      square = mean**2 + 2 * mean * (spent - mean)
      return config.madds_weight * square / config.madds_unit**2
    price += config.price_damping * self._excess(argmax_madds)
    return price * spent / self._madds[-1]

  def _excess(self, madds):
    return (madds - self.config.target_madds) / self._madds[-1]

  def _next_price(self, price, metrics, step):
    config = self.config
    if config.target_madds is None or config.target != 'sandwich':
      return price
    # As the head slows down, so must the price, or it runs ahead of the
    # head's answer and the two swing.
    pace = self._schedule(step) / config.optimizer.learning_rate
    return price + config.price_rate * pace * self._excess(metrics['madds'])


def head_of(variables: models.Variables) -> models.Arrays:
  """Returns the slimming head's parameters."""
  return {p: x for p, x in variables.params.items() if models.is_slimming(p)}


def _with_head(variables, head):
  return variables.replace(params={**variables.params, **head})


def _check_target(target, madds):
  if target is not None and not madds[0] <= target <= madds[-1]:
    raise ValueError(
      f'gate.target_madds={target:g} is out of reach: the buckets cost'
      f' {madds[0]:,.0f} to {madds[-1]:,.0f} MAdds.'
    )
