"""Every family trains in bfloat16, through all phases, and predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import inference, models, parallel
from ds_jax.train import calibrate, gate, supernet

pytestmark = pytest.mark.slow

_BOTTLENECKS = dict(
  stem=dict(widths=(8, 16), kernel_size=3, stride=2, pool=True),
  stages=(
    dict(widths=(16, 32), inner=(4, 8), depths=(1,)),
    dict(widths=(16, 24, 32), inner=(4, 8, 8), depths=(1, 2, 2), stride=2),
  ),
  gate_stage=1,
)
_BLOCKS = dict(
  image_size=16,
  patch_size=4,
  head_dim=8,
  drop_path_rate=0.2,
  stages=(
    dict(widths=(16,), heads=(2,), hidden=(32,), depths=(1,)),
    dict(
      widths=(8, 8, 16), heads=(1, 1, 2), hidden=(16, 32, 32), depths=(1, 2, 2)
    ),
  ),
  gate_stage=1,
)
_SEPARABLE = dict(
  stem_widths=(8, 12),
  stages=(
    dict(widths=(8, 16), kernels=(3, 5)),
    dict(widths=(8, 12, 16), kernels=(3, 3, 5), depth=2, stride=2),
  ),
  gate_stage=1,
)
# The named models' own classes, at sizes that compile in seconds.
MODELS = (
  ('ds_mobilenet_pp', _SEPARABLE),
  ('ds_resnet50', _BOTTLENECKS),
  ('ds_vit_s16', _BLOCKS),
)


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batch():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 8, 16, 16, 3)).astype(np.uint8)
  return {
    'images': images[0],
    'teacher_images': images[1],
    'labels': rng.integers(0, 3, 8).astype(np.int32),
  }


def make_phases(model):
  executor = parallel.Executor(devices=jax.devices()[:1])
  adamw = config_lib.OptimizerConfig(
    name='adamw', learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0
  )
  options = dict(num_steps=4, steps_per_epoch=4, seed=0, executor=executor)
  return (
    supernet.Supernet(
      config_lib.SupernetConfig(
        num_epochs=1, optimizer=adamw, num_random=1, multi_view=True
      ),
      model,
      normalize,
      **options,
    ),
    calibrate.Calibrate(
      config_lib.CalibrateConfig(2), model, normalize, executor=executor
    ),
    gate.Gate(
      config_lib.GateConfig(num_epochs=1, optimizer=adamw),
      model,
      normalize,
      image_size=16,
      **options,
    ),
  )


def changed(before, after):
  # The moving average of an array that stays rounds its last bit.
  return {
    path
    for path, array in before.items()
    if not np.allclose(array, after[path], rtol=1e-6, atol=0)
  }


class FamilyTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_trains_in_bfloat16_and_predicts(self, name, options):
    model = models.create_model(name, 3, dtype='bfloat16', **options)
    phases, batch = make_phases(model), make_batch()
    before = models.variables_of(model)
    slimming = {p for p in before.params if models.is_slimming(p)}
    variables = before
    for phase in phases:
      state = phase.init(variables)
      # Two, since a residual branch that starts as zero passes nothing back.
      for step in range(min(2, phase.num_steps)):
        state, metrics = phase.step(state, batch, step)
        assert all(np.isfinite(v) for v in metrics.values()), phase.name
      after = state.network
      assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype('float32')}
      moved = changed(variables.params, after.params)
      if phase.name == 'supernet':
        # Neither its gradient nor weight decay moves the gate, and every
        # sub-network's weights are trained.
        assert not moved & slimming
        assert len(moved) > 0.9 * (len(before.params) - len(slimming))
      else:
        assert moved <= slimming
      variables = after
    assert changed(before.params, variables.params) & slimming

    predictor = inference.Predictor(
      models.Architecture(model).bind(variables),
      image_size=16,
      mean=(0.5,) * 3,
      std=(0.25,) * 3,
    )
    routed = predictor(batch['images'])
    assert routed.logits.shape == (8, 3) and routed.logits.dtype == np.float32
    for bucket in set(routed.buckets.tolist()):
      fixed = predictor(batch['images'], subnet=bucket)
      rows = routed.buckets == bucket
      # bfloat16 activations have 8 bits, and tiles round in another order.
      np.testing.assert_allclose(
        routed.logits[rows], fixed.logits[rows], rtol=0.05, atol=0.05
      )
    widest = predictor(batch['images'], subnet=model.widest.index)
    assert set(widest.madds) == {model.cost(model.widest, 16).madds}
