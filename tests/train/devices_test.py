"""Tests that many devices train like one, with either executor."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import calibrate, gate, supernet

pytestmark = pytest.mark.slow

BATCH_SIZE, NUM_STEPS = 16, 3
STAGES = ('supernet', 'calibrate', 'gate')


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batch(step, size=BATCH_SIZE):
  rng = np.random.default_rng(step)
  return {
    'images': rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8),
    'labels': rng.integers(0, 3, size).astype(np.int32),
  }


def create_model(dropout_rate=0.2):
  return models.create_abstract_model(
    'ds_mobilenet',
    3,
    stem_widths=(4, 8),
    stages=(dict(widths=(4, 6, 8)),),
    gate_stage=0,
    dropout_rate=dropout_rate,
  )


def create_vit():
  """Without batch norm; wide enough for arrays that fsdp shards."""
  stage = dict(widths=(32, 64), heads=(1, 2), hidden=(32, 64), depths=(1, 1))
  return models.create_abstract_model(
    'ds_vit_cifar',
    3,
    image_size=8,
    head_dim=16,
    stages=(
      dict(widths=(64,), heads=(2,), hidden=(64,), depths=(1,)),
      stage,
      stage,
    ),
  )


def random_variables(model, scale=0.5):
  rng = np.random.default_rng(0)

  def fill(path, array):
    noise = rng.normal(0, scale, array.shape).astype(np.float32)
    positive = path.endswith(('scale', 'variance'))
    return jnp.asarray(np.exp(noise) if positive else noise)

  variables = models.variables_of(model)
  return models.Variables(
    {path: fill(path, array) for path, array in variables.params.items()},
    {path: fill(path, array) for path, array in variables.batch_stats.items()},
  )


def executor(num_devices, name='pjit', fsdp=1):
  config = config_lib.ParallelConfig(name, fsdp)
  return parallel.Executor(config, jax.devices()[:num_devices])


def make_phase(
  name, executor, model, accumulation_steps=1, num_random=1, **gate_options
):
  sgd = config_lib.OptimizerConfig(learning_rate=0.1, weight_decay=1e-4)
  common = dict(model=model, normalize=normalize, executor=executor)
  options = dict(num_steps=10, steps_per_epoch=10, seed=0)
  if name == 'supernet':
    config = config_lib.SupernetConfig(
      num_epochs=1,
      optimizer=sgd,
      num_random=num_random,
      ensemble=True,
      accumulation_steps=accumulation_steps,
    )
    return supernet.Supernet(config, **common, **options)
  if name == 'calibrate':
    config = config_lib.CalibrateConfig(NUM_STEPS)
    return calibrate.Calibrate(config, **common)
  if name == 'gate':
    madds = [model.cost(s, 8).madds for s in model.routing_space]
    target = (madds[0] + madds[-1]) / 2
    gate_options = {'target_madds': target, **gate_options}
    config = config_lib.GateConfig(num_epochs=1, optimizer=sgd, **gate_options)
    return gate.Gate(config, image_size=8, **common, **options)
  raise ValueError(name)


def train(phase, variables):
  state, all_metrics = phase.init(variables), []
  for step in range(NUM_STEPS):
    batch = make_batch(step)
    state, metrics = phase.step(state, batch, step)
    all_metrics.append(metrics)
  return state, all_metrics


def assert_near(found, expected, tolerance=1e-4):
  """Equal, within a share of each array's largest number."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, one), other in zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(expected),
    strict=True,
  ):
    other = np.asarray(other)
    scale = max(np.abs(other).max(), 1e-2)
    np.testing.assert_allclose(
      one, other, rtol=0, atol=tolerance * scale, err_msg=str(path)
    )


class DevicesTest(parameterized.TestCase):
  """The global batch is the same, so are sub-networks, dropout and noise.

  What differs is the order of sums: within devices, then over them. That is
  some float32 roundings (6e-8), which batch norm and three steps make larger.
  Statistics or losses of an eighth of the batch would be off by 0.1 or more.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    assert jax.device_count() == 8
    cls.model = create_model()
    cls.variables = random_variables(cls.model)
    cls.phases = {
      (name, n): make_phase(name, executor(n), cls.model)
      for name in STAGES
      for n in (1, 8)
    }
    # Each phase starts where one device left the phase before.
    start = cls.variables
    cls.starts, cls.runs = {}, {}
    for name in STAGES:
      cls.starts[name] = start
      cls.runs[name] = {n: train(cls.phases[name, n], start) for n in (1, 8)}
      start = jax.tree.map(np.asarray, cls.runs[name][1][0].network)

  @parameterized.parameters(*STAGES)
  def test_eight_devices_equal_one(self, name):
    assert_near(self.runs[name][8], self.runs[name][1])

  @parameterized.parameters(*STAGES)
  def test_every_device_holds_the_whole_state(self, name):
    state, all_metrics = self.runs[name][8]
    for array in jax.tree.leaves((state, all_metrics)):
      assert array.is_fully_replicated and len(array.devices()) == 8

  def test_phases_changed_something(self):
    networks = [self.variables]
    names = ('supernet', 'calibrate', 'gate')
    networks += [self.runs[name][8][0].network for name in names]
    for before, after in zip(networks, networks[1:], strict=False):
      assert any(
        (np.asarray(one) != np.asarray(other)).any()
        for one, other in zip(
          *map(jax.tree.leaves, (before, after)), strict=True
        )
      )

  # Batch norm is frozen there, or takes the moments of the global batch; and
  # noise is drawn for that.
  @parameterized.parameters('calibrate', 'gate')
  def test_replicas_equal_one_device_but_in_stage_one(self, name):
    phase = make_phase(name, executor(8, 'pmap'), self.model)
    assert_near(train(phase, self.starts[name]), self.runs[name][1])

  @parameterized.parameters(
    dict(balances_labels=True),
    dict(target_madds=None, madds_unit=1e3),
    dict(target='correctness'),
  )
  def test_replicas_equal_one_device_with_every_loss(self, **options):
    one, many = (
      train(make_phase('gate', e, self.model, **options), self.starts['gate'])
      for e in (executor(1), executor(8, 'pmap'))
    )
    assert_near(many, one)

  @parameterized.parameters('supernet', 'calibrate', 'gate')
  def test_batch_that_does_not_divide_is_refused(self, name):
    phase = self.phases[name, 8]
    state = phase.init(self.variables)
    with pytest.raises(ValueError, match='12 does not divide over 8 devices'):
      phase.step(state, make_batch(0, size=12), 0)

  def test_micro_batch_that_does_not_divide_is_refused(self):
    phase = make_phase('supernet', executor(8), self.model, 4)
    state = phase.init(self.variables)
    with pytest.raises(ValueError, match='4 does not divide over 8 .*micro-ba'):
      phase.step(state, make_batch(0), 0)


class ReplicasTest(parameterized.TestCase):
  def test_replicas_that_see_the_same_equal_the_global_batch(self):
    """Two images, the same on each of eight: their statistics are all's.

    For one step: after it the running variances, which the teacher uses,
    differ, being the unbiased ones of 2 and of 16 images.
    """
    model = create_model(dropout_rate=0.0)
    batch = {
      k: np.tile(v, (8,) + (1,) * (v.ndim - 1))
      for k, v in make_batch(0, size=2).items()
    }
    one, many = (
      phase.step(phase.init(random_variables(model)), batch, 0)[0]
      for phase in (
        make_phase('supernet', e, model)
        for e in (executor(1), executor(8, 'pmap'))
      )
    )
    assert_near(many.variables.params, one.variables.params)
    assert_near(many.network.params, one.network.params)
    for path, mean in one.variables.batch_stats.items():
      if path.endswith('mean'):
        assert_near(many.variables.batch_stats[path], mean)

  def test_replicas_have_batch_norms_of_their_own(self):
    """The published way: it is not what the global batch gives."""
    model = create_model(dropout_rate=0.0)
    one, many = (
      train(make_phase('supernet', e, model), random_variables(model))[0]
      for e in (executor(1), executor(8, 'pmap'))
    )
    kernel = 'classifier/kernel'
    difference = np.abs(
      np.subtract(many.variables.params[kernel], one.variables.params[kernel])
    )
    assert difference.max() > 1e-3

  def test_replicas_have_keys_of_their_own(self):
    replicas = executor(8, 'pmap')

    def run(key, rows):
      key = replicas.key_of_replica(key)
      return jax.random.uniform(key, rows.shape)

    draw = replicas.compile(
      run, [parallel.WHOLE, parallel.BATCH], parallel.BATCH
    )
    drawn = draw(jax.random.key(0), replicas.put_batch(np.zeros(8)))
    assert len(set(np.asarray(drawn).tolist())) == 8

  def test_noise_of_replicas_is_that_of_the_global_batch(self):
    def draw(executor):
      def run(key, rows):
        return executor.draw(jax.random.gumbel, key, (len(rows), 3))

      compiled = executor.compile(
        run, [parallel.WHOLE, parallel.BATCH], parallel.BATCH
      )
      return compiled(jax.random.key(1), executor.put_batch(np.zeros(16)))

    np.testing.assert_array_equal(draw(executor(8, 'pmap')), draw(executor(8)))


class WithoutBatchNormTest(parameterized.TestCase):
  """A ViT: executors and layouts differ in nothing but roundings."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Small enough for the arrays here.
    patch = mock.patch.object(parallel, '_MIN_SHARDED_SIZE', 1024)
    cls.enterClassContext(patch)
    cls.model = create_vit()
    cls.variables = random_variables(cls.model, scale=0.1)
    cls.one = {name: cls.run_with(executor(1), name) for name in STAGES[::2]}

  @classmethod
  def run_with(cls, executor, name):
    phase = make_phase(name, executor, cls.model, num_random=0)
    return train(phase, cls.variables)

  @parameterized.product(name=STAGES[::2], layout=(('pmap', 1), ('pjit', 8)))
  def test_replicas_and_shards_equal_one_device(self, name, layout):
    assert_near(self.run_with(executor(8, *layout), name), self.one[name])

  def test_parameters_optimiser_and_average_are_sharded_alike(self):
    state, _ = self.run_with(executor(8, fsdp=4), 'supernet')
    kernel = 'stages/1/0/expand/kernel'
    momentum = [
      array
      for path, array in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if kernel in jax.tree_util.keystr(path)
    ]
    assert len(momentum) == 1
    for array in (
      state.variables.params[kernel],
      state.network.params[kernel],
      *momentum,
    ):
      assert array.shape == (64, 64)
      assert array.addressable_shards[0].data.shape == (16, 64)
    # Not worth a collective.
    assert state.variables.params['norm/scale'].is_fully_replicated


class ExecutorTest(parameterized.TestCase):
  def test_batches_are_split_and_parameters_copied(self):
    executor = parallel.Executor()
    batch = make_batch(0)
    split = executor.put_batch(batch)
    for name, array in batch.items():
      np.testing.assert_array_equal(split[name], array)
      for i, shard in enumerate(split[name].addressable_shards):
        np.testing.assert_array_equal(shard.data, array[2 * i : 2 * i + 2])
    assert len(executor.put(batch)['images'].devices()) == 8

  def test_laid_out_arrays_are_copies(self):
    array = jnp.arange(4.0)
    copy = executor(1).put(array)
    jax.jit(lambda x: x + 1, donate_argnums=0)(copy)
    np.testing.assert_array_equal(array, [0, 1, 2, 3])

  @parameterized.parameters(1, 2, 4, 8)
  def test_shards_hold_what_was_put(self, fsdp):
    array = np.arange(100 * 1024, dtype=np.float32).reshape(100, 1024)
    put = executor(8, fsdp=fsdp).put(array)
    np.testing.assert_array_equal(put, array)
    assert put.addressable_shards[0].data.shape == (100, 1024 // fsdp)

  def test_devices_that_do_not_divide_are_refused(self):
    with pytest.raises(ValueError, match='fsdp=3 does not divide 8 devices'):
      executor(8, fsdp=3)

  @parameterized.parameters(
    (dict(executor='xmap'), "executor='xmap': expected 'pjit' or 'pmap'"),
    (dict(fsdp=0), 'fsdp=0: expected at least 1'),
    (dict(executor='pmap', fsdp=2), "fsdp=2 shards .* set executor='pjit'"),
    (dict(heartbeat_seconds=0), 'heartbeat_seconds=0: expected at least 1'),
  )
  def test_a_wrong_config_is_refused(self, options, message):
    with pytest.raises(ValueError, match=message):
      config_lib.ParallelConfig(**options)
