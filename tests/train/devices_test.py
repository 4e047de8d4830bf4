"""Tests that eight devices train like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import mesh as meshes
from ds_jax import models
from ds_jax.train import calibrate, gate, optimizer, supernet

BATCH_SIZE, NUM_STEPS = 16, 3


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batch(step, size=BATCH_SIZE):
  rng = np.random.default_rng(step)
  return {
    'images': rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8),
    'labels': rng.integers(0, 3, size).astype(np.int32),
  }


def create_model():
  return models.create_abstract_model(
    'ds_mobilenet',
    3,
    stem_widths=(4, 8),
    stages=(dict(widths=(4, 6, 8)),),
    gate_stage=0,
    dropout_rate=0.2,
  )


def random_variables(model):
  rng = np.random.default_rng(0)

  def fill(path, array):
    noise = rng.normal(0, 0.5, array.shape).astype(np.float32)
    positive = path.endswith(('scale', 'variance'))
    return jnp.asarray(np.exp(noise) if positive else noise)

  variables = models.variables_of(model)
  return models.Variables(
    {path: fill(path, array) for path, array in variables.params.items()},
    {path: fill(path, array) for path, array in variables.batch_stats.items()},
  )


def make_stages(mesh, accumulation_steps=1):
  model = create_model()
  sgd = optimizer.OptimizerConfig(learning_rate=0.1, weight_decay=1e-4)
  options = dict(num_steps=10, steps_per_epoch=10, seed=0, mesh=mesh)
  return (
    supernet.Supernet(
      supernet.SupernetConfig(
        num_epochs=1,
        optimizer=sgd,
        num_random=1,
        ensemble=True,
        accumulation_steps=accumulation_steps,
      ),
      model,
      normalize,
      **options,
    ),
    calibrate.Calibrate(
      calibrate.CalibrateConfig(NUM_STEPS), model, normalize, mesh=mesh
    ),
    gate.Gate(
      gate.GateConfig(num_epochs=1, optimizer=sgd, target_madds=2.8e3),
      model,
      normalize,
      image_size=8,
      **options,
    ),
  )


class DevicesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    assert jax.device_count() == 8
    cls.variables = random_variables(create_model())
    cls.meshes = {n: meshes.make_mesh(jax.devices()[:n]) for n in (1, 8)}
    cls.stages = {n: make_stages(mesh) for n, mesh in cls.meshes.items()}
    # Each stage starts where one device left the stage before.
    start = cls.variables
    cls.runs = {}
    for i, name in enumerate(('supernet', 'calibrate', 'gate')):
      cls.runs[name] = {
        n: cls.train(stages[i], start) for n, stages in cls.stages.items()
      }
      start = jax.tree.map(np.asarray, cls.runs[name][1][0].network)

  @staticmethod
  def train(stage, variables):
    state, all_metrics = stage.init(variables), []
    for step in range(NUM_STEPS):
      state, metrics = stage.step(state, make_batch(step), step)
      all_metrics.append(metrics)
    return state, all_metrics

  # The global batch is the same, so are sub-networks, dropout and noise. What
  # differs is the order of sums: within devices, then over them. That is some
  # float32 roundings (6e-8), which batch norm and three steps make larger.
  # Statistics or losses of an eighth of the batch would be off by 0.1 or more.
  @parameterized.parameters('supernet', 'calibrate', 'gate')
  def test_eight_devices_equal_one(self, name):
    one, eight = (self.runs[name][n] for n in (1, 8))
    assert jax.tree.structure(one) == jax.tree.structure(eight)
    for (path, found), expected in zip(
      jax.tree_util.tree_leaves_with_path(eight),
      jax.tree.leaves(one),
      strict=True,
    ):
      expected = np.asarray(expected)
      scale = max(np.abs(expected).max(), 1e-2)
      np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * scale, err_msg=str(path)
      )

  @parameterized.parameters('supernet', 'calibrate', 'gate')
  def test_every_device_holds_the_whole_state(self, name):
    state, all_metrics = self.runs[name][8]
    for array in jax.tree.leaves((state, all_metrics)):
      assert array.is_fully_replicated and len(array.devices()) == 8

  def test_stages_changed_something(self):
    networks = [self.variables]
    networks += [runs[8][0].network for runs in self.runs.values()]
    for before, after in zip(networks, networks[1:], strict=False):
      assert any(
        (np.asarray(one) != np.asarray(other)).any()
        for one, other in zip(
          *map(jax.tree.leaves, (before, after)), strict=True
        )
      )

  @parameterized.parameters(0, 1, 2)
  def test_batch_that_does_not_divide_is_refused(self, i):
    stage = self.stages[8][i]
    state = stage.init(self.variables)
    with pytest.raises(ValueError, match='12 does not divide over 8 devices'):
      stage.step(state, make_batch(0, size=12), 0)

  def test_micro_batch_that_does_not_divide_is_refused(self):
    stage = make_stages(self.meshes[8], accumulation_steps=4)[0]
    state = stage.init(self.variables)
    with pytest.raises(ValueError, match='4 does not divide over 8 .*micro-ba'):
      stage.step(state, make_batch(0), 0)


class MeshTest(parameterized.TestCase):
  def test_batches_are_split_and_parameters_copied(self):
    mesh = meshes.make_mesh()
    batch = make_batch(0)
    split = meshes.shard_batch(mesh, batch)
    for name, array in batch.items():
      np.testing.assert_array_equal(split[name], array)
      for i, shard in enumerate(split[name].addressable_shards):
        np.testing.assert_array_equal(shard.data, array[2 * i : 2 * i + 2])
    assert len(meshes.replicate(mesh, batch)['images'].devices()) == 8

  def test_replicated_arrays_are_copies(self):
    mesh = meshes.make_mesh(jax.devices()[:1])
    array = jnp.arange(4.0)
    copy = meshes.replicate(mesh, array)
    jax.jit(lambda x: x + 1, donate_argnums=0)(copy)
    np.testing.assert_array_equal(array, [0, 1, 2, 3])
