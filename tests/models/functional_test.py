"""Tests of models as code and plain dicts of arrays."""

import jax
import numpy as np
import pytest
from absl.testing import parameterized

import ds_jax
from ds_jax import models


def make_model(seed=0):
  return ds_jax.create_model(
    'ds_mobilenet',
    3,
    seed=seed,
    stem_widths=(4, 6),
    stages=(dict(widths=(4, 6, 8), stride=2),),
    gate_stage=0,
  )


class ArchitectureTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = make_model()
    cls.variables = models.variables_of(cls.model)
    cls.images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    cls.images = cls.images.astype(np.float32)

  def test_model_bound_to_its_own_arrays_gives_the_same(self):
    bound = models.Architecture(self.model).bind(self.variables)
    np.testing.assert_array_equal(
      bound(self.images, bound.widest),
      self.model(self.images, self.model.widest),
    )

  def test_bound_arrays_are_the_ones_given(self):
    bound = models.Architecture(self.model).bind(self.variables)
    for one, other in zip(
      jax.tree.leaves(models.variables_of(bound)),
      jax.tree.leaves(self.variables),
      strict=True,
    ):
      assert one is other

  def test_under_jit_the_arrays_are_arguments(self):
    other = make_model(seed=1)
    architecture = models.Architecture(self.model)

    @jax.jit
    def run(variables, images):
      model = architecture.bind(variables)
      return model(images, model.narrowest)

    # The same rounding, but for what XLA fuses.
    for model in (self.model, other):
      np.testing.assert_allclose(
        run(models.variables_of(model), self.images),
        model(self.images, model.narrowest),
        rtol=1e-5,
        atol=1e-6,
      )
    assert run._cache_size() == 1

  def test_statistics_move_in_the_bound_model_alone(self):
    before = {k: np.array(v) for k, v in self.variables.batch_stats.items()}
    bound = models.Architecture(self.model).bind(self.variables)
    bound(self.images, bound.widest, momentum=0.5)
    after = models.variables_of(bound).batch_stats
    assert any((after[k] != v).any() for k, v in before.items())
    for path, array in models.variables_of(self.model).batch_stats.items():
      np.testing.assert_array_equal(array, before[path])

  def test_paths_name_every_array(self):
    params, batch_stats = self.variables.params, self.variables.batch_stats
    assert params['stages/0/0/pointwise/kernel'].shape == (6, 8)
    assert params['stages/0/0/gate/slim/kernel'].shape == (1, 3)
    assert batch_stats['stem_norm/mean'].shape == (2, 6)
    assert {p.rsplit('/', 1)[1] for p in params} == {'kernel', 'bias', 'scale'}
    assert {p.rsplit('/', 1)[1] for p in batch_stats} == {'mean', 'variance'}

  @parameterized.parameters('params', 'batch_stats')
  def test_misfits_are_listed(self, kind):
    arrays = dict(getattr(self.variables, kind))
    missing = [name for name in arrays if name.startswith('stem')]
    for name in missing:
      del arrays[name]
    arrays |= {'b/kernel': np.zeros(1), 'a/kernel': np.zeros(1)}
    variables = self.variables.replace(**{kind: arrays})
    with pytest.raises(ValueError) as raised:
      models.Architecture(self.model).bind(variables)
    assert f'missing {sorted(missing)}' in str(raised.value)
    assert "unknown ['a/kernel', 'b/kernel']" in str(raised.value)
