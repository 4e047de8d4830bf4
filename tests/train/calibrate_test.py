"""Tests of calibration: each row is a plain mean over batches."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import calibrate


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


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


def make_batches():
  rng = np.random.default_rng(1)
  return [
    rng.integers(0, high, (8, 8, 8, 3)).astype(np.uint8)
    for high in (64, 128, 256)
  ]


def calibrated(
  model, variables, batches, num_devices=1, executor='pjit', momentum=None
):
  """The network after a step for each batch."""
  executor = parallel.Executor(
    config_lib.ParallelConfig(executor), jax.devices()[:num_devices]
  )
  config = config_lib.CalibrateConfig(len(batches), momentum)
  phase = calibrate.Calibrate(config, model, normalize, executor=executor)
  assert phase.num_steps == len(batches)
  state = phase.init(variables)
  for step, images in enumerate(batches):
    state, _ = phase.step(state, {'images': images}, step)
  return state.network


class CalibrateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = models.create_abstract_model(
      'ds_mobilenet',
      3,
      stem_widths=(4, 6),
      stages=(
        dict(widths=(4, 8)),
        dict(widths=(4, 6, 8), depth=2, stride=2),
      ),
      gate_stage=1,
    )
    cls.variables = random_variables(cls.model)
    cls.batches = make_batches()
    cls.network = calibrated(cls.model, cls.variables, cls.batches)

  def test_weights_are_left_alone(self):
    for path, array in self.variables.params.items():
      np.testing.assert_array_equal(self.network.params[path], array)

  def test_first_rows_are_the_mean_of_the_batches_moments(self):
    kernel = self.variables.params['stem/kernel']
    for row, width in ((0, 4), (1, 6)):
      outputs = [
        jax.lax.conv_general_dilated(
          normalize(images),
          kernel[..., :width],
          (2, 2),
          ((1, 1), (1, 1)),
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        for images in self.batches
      ]
      outputs = np.asarray(outputs, np.float64)
      moments = {
        'mean': outputs.mean((1, 2, 3)),
        'variance': outputs.var((1, 2, 3), ddof=1),
      }
      for kind, values in moments.items():
        path = f'stem_norm/{kind}'
        found = np.asarray(self.network.batch_stats[path][row])
        np.testing.assert_allclose(
          found[:width], values.mean(0), rtol=1e-5, atol=1e-5
        )
        # What the slice does not read keeps what it had.
        before = self.variables.batch_stats[path][row, width:]
        np.testing.assert_array_equal(found[width:], before)

  def test_every_row_is_the_mean_of_each_sub_network_s_moments(self):
    architecture = models.Architecture(self.model)
    subnets = self.model.sub_networks
    assert len(subnets) == 4

    @jax.jit
    def moments(images):
      """All rows as this batch alone makes them."""
      model = architecture.bind(self.variables)
      for subnet in subnets:
        model(normalize(images), subnet, momentum=1.0)
      return models.variables_of(model).batch_stats

    batches = [moments(images) for images in self.batches]
    for path, found in self.network.batch_stats.items():
      rows = np.stack([batch[path] for batch in batches])
      scale = np.abs(rows).max()
      np.testing.assert_allclose(
        found, rows.mean(0), rtol=0, atol=1e-5 * scale, err_msg=path
      )
      # Not what was there, nor what one batch would leave: in every row.
      for other in (self.variables.batch_stats[path], rows[0], rows[-1]):
        assert (np.abs(found - other).max(-1) > 1e-3 * scale).all(), path

  def test_bucket_statistics_are_in_rows_of_their_own(self):
    # Channel 0 of the block before is the same in every bucket; not here.
    rows = self.network.batch_stats['stages/1/1/pointwise_norm/mean']
    assert rows.shape == (4, 8)
    assert len(np.unique(np.asarray(rows)[:, 0])) == 4


OWN_GATE = dict(
  stem_widths=(4, 6),
  stages=(dict(widths=(4, 8)), dict(widths=(4, 6, 8), stride=2)),
  gate_stage=1,
  gate_head='own',
)
BLOCKS = dict(
  image_size=8,
  patch_size=4,
  head_dim=4,
  stages=(
    dict(widths=(8,), heads=(2,), hidden=(8,), depths=(1,)),
    dict(widths=(4, 8), heads=(1, 2), hidden=(8,), depths=(1,)),
  ),
  gate_stage=1,
)


class GateNormTest(parameterized.TestCase):
  @parameterized.parameters(
    ('ds_mobilenet', OWN_GATE, None, [1 / 3, 1 / 3, 1 / 3]),
    ('ds_vit_cifar', BLOCKS, None, [1 / 3, 1 / 3, 1 / 3]),
    # A quarter of each batch, but for the first.
    ('ds_vit_cifar', BLOCKS, 0.25, [9 / 16, 3 / 16, 4 / 16]),
  )
  def test_is_a_mean_of_the_batches_moments(
    self, name, options, momentum, shares
  ):
    model = models.create_abstract_model(name, 3, **options)
    variables, batches = random_variables(model), make_batches()
    network = calibrated(model, variables, batches, momentum=momentum)
    norm = {'slim/norm/mean', 'slim/norm/variance'}
    assert (network.batch_stats.keys() == norm) == (options is BLOCKS)
    architecture = models.Architecture(model)

    @jax.jit
    def trunk(images):
      # Its own norms, where it has any, take the batch's moments as well.
      bound = architecture.bind(variables)
      return bound.trunk(normalize(images), momentum=1.0)

    moments = []
    for images in batches:
      x = np.asarray(trunk(images), np.float64)
      x = x.reshape(len(x), -1, x.shape[-1])
      deviation = np.sqrt(x.var(1) + 1e-6)
      pooled = np.concatenate([x.mean(1), x.max(1), deviation], axis=1)
      moments.append((pooled.mean(0), pooled.var(0, ddof=1)))
    for kind, values in zip(
      ('mean', 'variance'), zip(*moments, strict=True), strict=True
    ):
      path = f'slim/norm/{kind}'
      expected = np.average(values, 0, weights=shares)
      (found,) = np.asarray(network.batch_stats[path])
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
      # Not what was there, nor what one batch would leave.
      for other in (variables.batch_stats[path][0], values[0], values[-1]):
        assert np.abs(found - other).max() > 1e-2


class ReplicasTest(parameterized.TestCase):
  def test_variance_between_images_is_kept_by_replicas(self):
    """Images of one colour vary between devices, and hardly within them."""
    model = models.create_abstract_model('ds_mobilenet', 3, **OWN_GATE)
    variables = random_variables(model)
    colours = np.random.default_rng(2).integers(0, 256, (2, 16, 1, 1, 3))
    batches = [np.tile(c.astype(np.uint8), (1, 8, 8, 1)) for c in colours]
    one, many = (
      calibrated(model, variables, batches, *on).batch_stats
      for on in ((1, 'pjit'), (8, 'pmap'))
    )
    for path, expected in one.items():
      scale = np.abs(np.asarray(expected)).max()
      np.testing.assert_allclose(
        many[path], expected, rtol=0, atol=1e-4 * scale, err_msg=path
      )
