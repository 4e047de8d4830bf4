"""Optimisers and schedules, from plain numbers to Optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ds_jax import config as config_lib


def learning_rate_schedule(
  config: config_lib.OptimizerConfig, num_steps: int, steps_per_epoch: int
) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, cosine decay, cool-down.

  Raises:
    ValueError: if warm-up and cool-down leave no step between them.
  """
  if not num_steps:
    return optax.constant_schedule(config.learning_rate)
  warmup = round(config.warmup_epochs * steps_per_epoch)
  cooldown = round(config.cooldown_epochs * steps_per_epoch)
  if warmup + cooldown >= num_steps:
    raise ValueError(
      f'A warm-up of {warmup} steps and a cool-down of {cooldown} leave none of'
      f' {num_steps} training steps; lower optimizer.warmup_epochs or'
      ' optimizer.cooldown_epochs, or raise num_epochs.'
    )
  if config.by_epoch:
    return _schedule_by_epoch(config, num_steps - cooldown, steps_per_epoch)
  return optax.warmup_cosine_decay_schedule(
    config.warmup_init if warmup else config.learning_rate,
    config.learning_rate,
    warmup,
    num_steps - cooldown,
    config.learning_rate * config.end_factor,
  )


def _schedule_by_epoch(config, decay_steps, steps_per_epoch) -> optax.Schedule:
  warmup = optax.linear_schedule(
    config.warmup_init, config.learning_rate, config.warmup_epochs
  )
  decay = optax.cosine_decay_schedule(
    config.learning_rate, decay_steps / steps_per_epoch, config.end_factor
  )

  def schedule(step):
    epoch = step // steps_per_epoch
    return jnp.where(epoch < config.warmup_epochs, warmup(epoch), decay(epoch))

  return schedule


def make_optimizer(
  config: config_lib.OptimizerConfig,
  schedule: optax.Schedule,
  frozen: Callable[[str], bool] = lambda path: False,
) -> optax.GradientTransformation:
  """Returns clipping, weight decay and the named optimiser in a chain.

  Args:
    config: the numbers.
    schedule: step to learning rate.
    frozen: paths without a gradient, which weight decay must not shrink.
  """

  def decays(params):
    return {p: p.endswith('kernel') and not frozen(p) for p in params}

  parts = []
  if config.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  if config.name == 'adamw':
    decay = dict(weight_decay=config.weight_decay, mask=decays)
    parts.append(optax.adamw(schedule, **decay))
  else:
    if config.weight_decay:
      parts.append(optax.add_decayed_weights(config.weight_decay, decays))
    parts.append(
      optax.sgd(schedule, config.momentum or None, nesterov=config.nesterov)
    )
  return optax.chain(*parts)


def moving_average(
  new, old, decay: float, step: jax.Array, *, warms_up: bool = True
):
  """Returns `decay * old + (1 - decay) * new`, leaf by leaf.

  Args:
    new: joins the average.
    old: the average so far.
    decay: the average's share.
    step: t, how many came before.
    warms_up: whether the decay is (1 + t) / (10 + t) where that is less, so
      that the start is soon forgotten.
  """
  if warms_up:
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return optax.incremental_update(new, old, 1 - decay)
