"""Tests of optimisers and schedules against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax.train import optimizer

CONFIG = config_lib.OptimizerConfig


def cosine(step, num_steps, warmup, peak, end):
  share = (step - warmup) / (num_steps - warmup)
  return end + (peak - end) * (1 + np.cos(np.pi * share)) / 2


def random_params(seed):
  rng = np.random.default_rng(seed)
  shapes = {'kernel': (3, 2), 'a/kernel': (3, 3, 2, 2), 'bias': (2,)}
  return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def run(config, num_steps=4):
  """Parameters after each step, of gradients that do not depend on them."""
  schedule = optimizer.learning_rate_schedule(config, num_steps, 1)
  transform = optimizer.make_optimizer(config, schedule)
  params = jax.tree.map(jnp.asarray, random_params(0))
  state = transform.init(params)
  for step in range(num_steps):
    updates, state = transform.update(random_params(1 + step), state, params)
    params = optax.apply_updates(params, updates)
    yield {name: np.asarray(array) for name, array in params.items()}


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 0.0), (1e-5, 0.0), (0.2, 0.1))
  def test_warms_up_linearly_and_decays_as_a_cosine(self, start, end_factor):
    config = CONFIG(
      learning_rate=0.5,
      warmup_epochs=1.5,
      warmup_init=start,
      end_factor=end_factor,
    )
    schedule = optimizer.learning_rate_schedule(config, 40, steps_per_epoch=4)
    for step in range(41):
      if step < 6:
        expected = start + (0.5 - start) * step / 6
      else:
        expected = cosine(step, 40, 6, 0.5, 0.5 * end_factor)
      np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)

  def test_without_warm_up_the_first_rate_is_the_peak(self):
    config = CONFIG(learning_rate=0.5)
    schedule = optimizer.learning_rate_schedule(config, 10, steps_per_epoch=4)
    for step in range(11):
      expected = cosine(step, 10, 0, 0.5, 0)
      np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)

  def test_cool_down_stays_at_the_last_rate(self):
    config = CONFIG(
      learning_rate=0.5,
      warmup_epochs=1.0,
      end_factor=0.1,
      cooldown_epochs=2.5,
    )
    schedule = optimizer.learning_rate_schedule(config, 40, steps_per_epoch=4)
    for step in range(4, 41):
      expected = cosine(min(step, 30), 30, 4, 0.5, 0.05)
      np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)

  @parameterized.parameters(0, 5)
  def test_by_epoch_it_is_timm_s_of_the_release(self, warmup):
    # 150 epochs and 10 of cool-down, of 7 steps; `CosineLRScheduler` of timm
    # 0.3.2 in plain numbers.
    config = CONFIG(
      learning_rate=0.08,
      warmup_epochs=warmup,
      warmup_init=1e-5,
      end_factor=1e-5 / 0.08,
      cooldown_epochs=10,
      by_epoch=True,
    )
    schedule = optimizer.learning_rate_schedule(config, 160 * 7, 7)
    found = jax.jit(jax.vmap(schedule))(np.arange(160 * 7))
    for step, rate in enumerate(np.asarray(found)):
      epoch = step // 7
      if epoch < warmup:
        expected = 1e-5 + epoch * (0.08 - 1e-5) / warmup
      elif epoch < 150:
        share = (1 + np.cos(np.pi * epoch / 150)) / 2
        expected = 1e-5 + (0.08 - 1e-5) * share
      else:
        expected = 1e-5
      np.testing.assert_allclose(rate, expected, rtol=1e-3, err_msg=step)

  @parameterized.parameters(False, True)
  def test_warm_up_and_cool_down_alone_are_refused(self, by_epoch):
    config = CONFIG(warmup_epochs=6, cooldown_epochs=4, by_epoch=by_epoch)
    with pytest.raises(ValueError, match='of 6 steps and a cool-down of 4 lea'):
      optimizer.learning_rate_schedule(config, 10, steps_per_epoch=1)

  @parameterized.parameters(10, 11)
  def test_warm_up_as_long_as_the_training_is_refused(self, warmup_epochs):
    config = CONFIG(warmup_epochs=warmup_epochs)
    with pytest.raises(ValueError, match=f'warm-up of {warmup_epochs} steps'):
      optimizer.learning_rate_schedule(config, 10, steps_per_epoch=1)


class OptimizerTest(parameterized.TestCase):
  @parameterized.product(
    momentum=(0.0, 0.9), nesterov=(False, True), weight_decay=(0.0, 0.1)
  )
  def test_sgd_is_pytorch_s(self, momentum, nesterov, weight_decay):
    config = CONFIG(
      learning_rate=0.1,
      momentum=momentum,
      nesterov=nesterov,
      weight_decay=weight_decay,
    )
    expected = random_params(0)
    velocity = dict.fromkeys(expected, 0.0)
    for step, found in enumerate(run(config)):
      for name, gradient in random_params(1 + step).items():
        # Vectors are not decayed.
        decay = 0.0 if name == 'bias' else weight_decay
        gradient = gradient + decay * expected[name]
        velocity[name] = momentum * velocity[name] + gradient
        move = velocity[name]
        if nesterov:
          move = gradient + momentum * velocity[name]
        expected[name] = expected[name] - cosine(step, 4, 0, 0.1, 0) * move
        np.testing.assert_allclose(
          found[name], expected[name], rtol=1e-5, atol=1e-6
        )

  def test_adamw_decays_matrices_alone(self):
    config = CONFIG(name='adamw', learning_rate=0.1, weight_decay=0.2)
    expected = random_params(0)
    first, second = (dict.fromkeys(expected, 0.0) for _ in range(2))
    for step, found in enumerate(run(config)):
      for name, gradient in random_params(1 + step).items():
        first[name] = 0.9 * first[name] + 0.1 * gradient
        second[name] = 0.999 * second[name] + 0.001 * gradient**2
        move = first[name] / (1 - 0.9 ** (step + 1))
        move = move / (np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
        decay = 0.0 if name == 'bias' else 0.2
        move = move + decay * expected[name]
        expected[name] = expected[name] - cosine(step, 4, 0, 0.1, 0) * move
        # Adam's quotient is sensitive where gradients are small.
        np.testing.assert_allclose(
          found[name], expected[name], rtol=1e-4, atol=1e-5
        )

  @parameterized.parameters(0.5, 100.0)
  def test_gradient_is_clipped_to_its_global_norm(self, clip_norm):
    config = CONFIG(learning_rate=1.0, momentum=0.0, clip_norm=clip_norm)
    gradient, params = random_params(1), random_params(0)
    norm = np.sqrt(
      sum((g.astype(np.float64) ** 2).sum() for g in gradient.values())
    )
    share = min(1, clip_norm / norm)
    (found,) = run(config, num_steps=1)
    for name in params:
      np.testing.assert_allclose(
        found[name], params[name] - share * gradient[name], rtol=1e-5, atol=1e-6
      )

  def test_another_name_is_refused(self):
    with pytest.raises(ValueError, match="'lion': expected 'sgd' or 'adamw'"):
      CONFIG(name='lion')


class MovingAverageTest(parameterized.TestCase):
  # The decay is (1 + t) / (10 + t) while that is less than 0.9.
  @parameterized.parameters(
    (0, True, 0.1), (80, True, 0.9), (500, True, 0.9), (0, False, 0.9)
  )
  def test_is_the_decay_s_share_of_old_and_new(self, step, warms_up, decay):
    new, old = random_params(0), random_params(1)
    found = optimizer.moving_average(new, old, 0.9, step, warms_up=warms_up)
    for name in old:
      expected = decay * old[name] + (1 - decay) * new[name]
      np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
