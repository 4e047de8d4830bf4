"""Tests of Stage I against losses and updates written out by hand."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import losses, supernet

SEED = 3
LEARNING_RATE = 0.1
SMOOTHING = 0.1


def create_model(num_buckets=3, **options):
  """One block; the widest is outside the routing space."""
  return models.create_abstract_model(
    'ds_mobilenet',
    3,
    stem_widths=(4, 8),
    stages=(dict(widths=range(4, 4 + 2 * num_buckets, 2)),),
    gate_stage=0,
    **options,
  )


def random_variables(model, seed=0):
  rng = np.random.default_rng(seed)

  def fill(path, array):
    noise = rng.normal(0, 0.5, array.shape).astype(np.float32)
    positive = path.endswith(('scale', 'variance'))
    return jnp.asarray(np.exp(noise) if positive else noise)

  variables = models.variables_of(model)
  return models.Variables(
    {path: fill(path, array) for path, array in variables.params.items()},
    {path: fill(path, array) for path, array in variables.batch_stats.items()},
  )


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batch(size=8, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'images': rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8),
    'labels': rng.integers(0, 3, size).astype(np.int32),
  }


def make_phase(model, **config):
  config = config_lib.SupernetConfig(
    num_epochs=1,
    optimizer=config_lib.OptimizerConfig(
      learning_rate=LEARNING_RATE, momentum=0.0
    ),
    label_smoothing=SMOOTHING,
    **config,
  )
  return supernet.Supernet(
    config,
    model,
    normalize,
    num_steps=10,
    steps_per_epoch=10,
    seed=SEED,
    executor=parallel.Executor(devices=jax.devices()[:1]),
  )


def soft_cross_entropy(logits, targets):
  """In float64."""
  logits = np.asarray(logits, np.float64)
  log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -(targets * log).sum(-1).mean()


def softmax(logits):
  logits = np.exp(np.asarray(logits, np.float64))
  return logits / logits.sum(-1, keepdims=True)


def to_numpy(tree):
  return jax.tree.map(np.array, tree)


def assert_close(found, expected, tolerance=1e-5):
  """Compares dicts of arrays to each array's largest magnitude."""
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    atol = tolerance * np.abs(value).max()
    np.testing.assert_allclose(found[path], value, rtol=0, atol=atol)


class DrawTest(parameterized.TestCase):
  def test_depends_on_seed_and_step_alone(self):
    model = create_model(num_buckets=7)
    one, other = (make_phase(model, num_random=2) for _ in range(2))
    draws = [one.draw(step) for step in range(40)]
    assert [other.draw(step) for step in reversed(range(40))] == draws[::-1]
    other.seed = SEED + 1
    assert [other.draw(step) for step in range(40)] != draws

  def test_draws_are_of_a_stream_that_no_library_changes(self):
    """Mersenne Twister's words, spelt out; so are the shuffles."""
    phase = make_phase(create_model(num_buckets=7), num_random=2)
    for step in range(1, 50):
      # Python seeds by the same key, which is this number's words.
      twister = random.Random(SEED + (step << 32))
      order = list(range(1, 7))
      for i in range(5, 0, -1):
        mask = 2 ** i.bit_length() - 1
        while (j := twister.getrandbits(32) & mask) > i:
          pass
        order[i], order[j] = order[j], order[i]
      expected = sorted(order[:2], reverse=True)
      assert [s.index for s in phase.draw(step)] == expected

  @parameterized.parameters(0, 1, 3, 6)
  def test_neither_narrowest_nor_widest_nor_one_twice(self, num_random):
    model = create_model(num_buckets=7)
    between = set(model.routing_space[1:])
    phase = make_phase(model, num_random=num_random)
    drawn = [phase.draw(step) for step in range(60)]
    assert all(len(d) == len(set(d)) == num_random for d in drawn)
    assert set().union(*drawn) == (between if num_random else set())
    # The wider first, so that a run does not depend on the order of drawing.
    assert all(
      d == sorted(d, key=lambda s: s.index, reverse=True) for d in drawn
    )

  def test_all_are_as_likely(self):
    phase = make_phase(create_model(num_buckets=7), num_random=2)
    counts = np.zeros(7)
    for step in range(600):
      for subnet in phase.draw(step):
        counts[subnet.index] += 1
    # Each in a third of the steps; five standard errors.
    error = 5 * np.sqrt(600 * (1 / 3) * (2 / 3))
    np.testing.assert_allclose(counts[1:], 200, rtol=0, atol=error)

  def test_with_replacement_all_pairs_are_as_likely(self):
    phase = make_phase(
      create_model(num_buckets=4), num_random=2, with_replacement=True
    )
    counts = np.zeros((4, 4))
    for step in range(900):
      counts[tuple(s.index for s in phase.draw(step))] += 1
    # Pairs of different ones come in two orders, and the wider first.
    expected = 900 / 9 * (2 * np.tri(4, k=-1) + np.eye(4))
    expected[:, 0] = expected[0] = 0
    np.testing.assert_allclose(
      counts, expected, rtol=0, atol=5 * np.sqrt(expected.max())
    )

  def test_with_replacement_one_is_enough(self):
    model = create_model(num_buckets=2)
    phase = make_phase(model, num_random=3, with_replacement=True)
    assert [s.index for s in phase.draw(0)] == [1, 1, 1]
    with pytest.raises(ValueError, match='num_random=3, but .* only 1 sub-net'):
      make_phase(model, num_random=3)

  def test_last_bucket_is_not_drawn_where_it_is_the_widest(self):
    model = models.create_abstract_model(
      'ds_mobilenet',
      3,
      stem_widths=(4,),
      stages=(dict(widths=(4, 6, 8)),),
      gate_stage=0,
    )
    phase = make_phase(model, num_random=1)
    assert {phase.draw(step)[0].index for step in range(20)} == {1}
    with pytest.raises(ValueError, match='num_random=2, but .* only 1 sub-net'):
      make_phase(model, num_random=2)

  def test_too_many_random_sub_networks_are_refused(self):
    with pytest.raises(ValueError, match='num_random=3, but .* only 2 sub-net'):
      make_phase(create_model(), num_random=3)


class SupernetTestCase(parameterized.TestCase):
  """A phase, whose programs are compiled once for a class."""

  config = {}
  options = {}

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_model(**cls.options)
    cls.subnets = (*cls.model.routing_space, cls.model.widest)
    cls.architecture = models.Architecture(cls.model)
    cls.phase = make_phase(cls.model, **cls.config)
    cls.variables = random_variables(cls.model)
    cls.teacher = random_variables(cls.model, seed=1)
    cls.batch = make_batch()

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def logits(self, variables, images, index, key=None, momentum=None):
    """Of sub-network `index`; the widest is 3."""
    model = self.architecture.bind(variables)
    return model(
      normalize(images), self.subnets[index], momentum=momentum, rng=key
    )

  def gradient(self, indices, key=None, batch=None):
    batch = self.phase.executor.put_batch(batch or self.batch)
    # The gradient is donated from pass to pass, the variables are not.
    return self.phase.gradient(
      self.variables,
      self.teacher,
      batch,
      [self.subnets[i] for i in indices],
      jax.random.key(0) if key is None else key,
    )


class BootstrappingTest(SupernetTestCase):
  """In-place bootstrapping, with dropout."""

  config = dict(num_random=2, momentum=0.2, ema_decay=0.9)
  options = dict(dropout_rate=0.5)

  def test_gradient_losses_and_statistics_are_the_sum_s(self):
    key = jax.random.key(7)
    images, labels = self.batch['images'], self.batch['labels']
    targets = jnp.asarray(
      softmax(self.logits(self.teacher, images, 3)), jnp.float32
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def expected(params):
      model = self.architecture.bind(self.variables.replace(params=params))
      run = functools.partial(model, normalize(images), momentum=0.2)
      parts = {
        'loss/widest': losses.cross_entropy(
          run(self.model.widest, rng=key), labels, SMOOTHING
        )
      }
      for index in (2, 1, 0):
        parts[f'loss/{index}'] = losses.soft_cross_entropy(
          run(self.subnets[index]), targets
        )
      return sum(parts.values()), (
        parts,
        models.variables_of(model).batch_stats,
      )

    gradient, (parts, batch_stats) = expected(self.variables.params)
    found, found_stats, metrics = self.gradient((2, 1), key)
    assert_close(found, gradient)
    assert_close(found_stats, batch_stats)
    assert metrics.keys() == {*parts, 'accuracy'}
    assert_close({name: metrics[name] for name in parts}, parts)

  def test_dropout_is_on_the_widest_alone(self):
    one, other = (self.gradient((2, 1), jax.random.key(s))[2] for s in (0, 1))
    assert one['loss/widest'] != other['loss/widest']
    for index in (2, 1, 0):
      assert one[f'loss/{index}'] == other[f'loss/{index}']

  def test_labels_are_smoothed_on_the_widest(self):
    key = jax.random.key(5)
    logits = self.logits(
      self.variables, self.batch['images'], 3, key, momentum=0.1
    )
    labels = self.batch['labels']
    targets = np.full((8, 3), SMOOTHING / 3)
    targets[np.arange(8), labels] += 1 - SMOOTHING
    metrics = self.gradient((), key)[2]
    expected = soft_cross_entropy(logits, targets)
    np.testing.assert_allclose(metrics['loss/widest'], expected, rtol=1e-5)
    accuracy = (np.asarray(logits).argmax(-1) == labels).mean()
    assert metrics['accuracy'] == accuracy

  # The decay is (1 + t) / (10 + t) while that is less than 0.9.
  @parameterized.parameters((0, 0.1), (2, 0.25), (80, 0.9), (1000, 0.9))
  def test_step_moves_the_weights_and_their_average(self, step, decay):
    state = self.phase.init(self.variables)
    state = state.replace(network=self.phase.executor.put(self.teacher))
    key = jax.random.fold_in(jax.random.key(SEED), step)
    gradient, batch_stats, _ = self.gradient((2, 1), key)
    gradient = to_numpy(gradient)
    new, metrics = self.phase.step(state, self.batch, step)
    expected = {
      path: array - LEARNING_RATE * gradient[path]
      for path, array in self.variables.params.items()
    }
    assert_close(new.variables.params, expected, 1e-6)
    assert_close(new.variables.batch_stats, batch_stats, 1e-6)
    for kind in ('params', 'batch_stats'):
      teacher, student = (
        getattr(v, kind) for v in (self.teacher, new.variables)
      )
      average = {
        path: decay * teacher[path] + (1 - decay) * np.asarray(student[path])
        for path in teacher
      }
      assert_close(getattr(new.network, kind), average, 1e-6)
    norm = np.sqrt(
      sum((g.astype(np.float64) ** 2).sum() for g in gradient.values())
    )
    np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)

  def test_steps_repeat_to_the_bit_and_keep_what_they_gave(self):
    before = to_numpy(self.variables)
    runs = []
    for _ in range(2):
      state, all_metrics = self.phase.init(self.variables), []
      for step in range(3):
        batch = make_batch(seed=step)
        state, metrics = self.phase.step(state, batch, step)
        all_metrics.append(metrics)
      # States are donated; metrics and the caller's arrays are not.
      runs.append(to_numpy((state, all_metrics)))
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
      np.testing.assert_array_equal(one, other)
    for one, other in zip(
      *map(jax.tree.leaves, (before, self.variables)), strict=True
    ):
      np.testing.assert_array_equal(one, other)


class EnsembleTest(SupernetTestCase):
  """In-place ensemble bootstrapping."""

  config = dict(num_random=2, ensemble=True)

  def test_narrowest_learns_from_the_mean_of_its_teachers(self):
    metrics = self.gradient((2, 1))[2]
    images = self.batch['images']
    teachers = {
      index: softmax(self.logits(self.teacher, images, index))
      for index in (3, 2, 1, 0)
    }
    targets = {
      2: teachers[3],
      1: teachers[3],
      0: (teachers[3] + teachers[2] + teachers[1]) / 3,
    }
    for index, target in targets.items():
      logits = self.logits(self.variables, images, index, momentum=0.1)
      expected = soft_cross_entropy(logits, target)
      np.testing.assert_allclose(
        metrics[f'loss/{index}'], expected, rtol=1e-5, err_msg=str(index)
      )
    # Another choice of teachers is another loss.
    alone = soft_cross_entropy(logits, teachers[3])
    assert abs(alone - expected) > 1e-3

  def test_without_random_sub_networks_it_learns_from_the_widest(self):
    metrics = self.gradient(())[2]
    images = self.batch['images']
    target = softmax(self.logits(self.teacher, images, 3))
    logits = self.logits(self.variables, images, 0, momentum=0.1)
    expected = soft_cross_entropy(logits, target)
    np.testing.assert_allclose(metrics['loss/0'], expected, rtol=1e-5)


class AccumulationTest(SupernetTestCase):
  config = dict(
    num_random=1, accumulation_steps=2, ema_decay=0.7, ema_warmup=False
  )

  def test_two_micro_batches_give_the_mean_of_their_gradients(self):
    (drawn,) = self.phase.draw(0)
    halves = [
      {name: array[part] for name, array in self.batch.items()}
      for part in (slice(4), slice(4, 8))
    ]
    results = [to_numpy(self.gradient((drawn.index,), batch=h)) for h in halves]
    state = self.phase.init(self.variables).replace(
      network=self.phase.executor.put(self.teacher)
    )
    new, metrics = self.phase.step(state, self.batch, 0)
    expected = {
      path: array
      - LEARNING_RATE * (results[0][0][path] + results[1][0][path]) / 2
      for path, array in self.variables.params.items()
    }
    assert_close(new.variables.params, expected)
    for name in ('loss/widest', f'loss/{drawn.index}', 'loss/0', 'accuracy'):
      mean = (results[0][2][name] + results[1][2][name]) / 2
      np.testing.assert_allclose(metrics[name], mean, rtol=1e-5)
    # From the first step on, since the average does not warm up.
    average = {
      path: 0.7 * self.teacher.params[path] + 0.3 * array
      for path, array in expected.items()
    }
    assert_close(new.network.params, average)
    # The second half's statistics come after the first's: both leave a tenth.
    start = np.asarray(self.variables.batch_stats['stem_norm/mean'])[1]
    moved = [(r[1]['stem_norm/mean'][1] - 0.9 * start) / 0.1 for r in results]
    expected = 0.9 * (0.9 * start + 0.1 * moved[0]) + 0.1 * moved[1]
    found = new.variables.batch_stats['stem_norm/mean'][1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class BfloatTest(SupernetTestCase):
  config = dict(num_random=1)
  options = dict(dtype='bfloat16')

  def test_losses_are_finite_and_arrays_stay_float32(self):
    state = self.phase.init(self.variables)
    state, metrics = self.phase.step(state, self.batch, 0)
    assert all(np.isfinite(value) for value in metrics.values())
    arrays = jax.tree.leaves((state.variables, state.network))
    assert {array.dtype for array in arrays} == {jnp.dtype('float32')}
    assert all(np.isfinite(array).all() for array in arrays)
    assert any(
      (np.asarray(state.variables.params[path]) != array).any()
      for path, array in self.variables.params.items()
    )


class MultiViewTest(SupernetTestCase):
  """The teacher sees one view, the students the other."""

  config = dict(num_random=1, ensemble=True, multi_view=True)

  def test_teacher_and_students_see_different_views(self):
    other = self.batch['images'] // 8  # far darker
    batch = {**self.batch, 'teacher_images': other}
    metrics = self.gradient((2,), batch=batch)[2]
    images, labels = batch['images'], batch['labels']
    teachers = [softmax(self.logits(self.teacher, other, i)) for i in (3, 2)]
    targets = {2: teachers[0], 0: (teachers[0] + teachers[1]) / 2}
    for index, target in targets.items():
      logits = self.logits(self.variables, images, index, momentum=0.1)
      expected = soft_cross_entropy(logits, target)
      np.testing.assert_allclose(
        metrics[f'loss/{index}'], expected, rtol=1e-5, err_msg=str(index)
      )
    # The widest learns from the labels, on the students' view.
    one_hot = np.eye(3)[labels] * (1 - SMOOTHING) + SMOOTHING / 3
    logits = self.logits(
      self.variables, images, 3, key=jax.random.key(0), momentum=0.1
    )
    np.testing.assert_allclose(
      metrics['loss/widest'], soft_cross_entropy(logits, one_hot), rtol=1e-5
    )
    # One view for both would be another loss.
    same = {**self.batch, 'teacher_images': images}
    assert abs(self.gradient((2,), batch=same)[2]['loss/0'] - expected) > 1e-4
