"""The predictor against the model run by hand, and its errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import ds_jax
import micro
from ds_jax import checkpoint, data, models, predict
from ds_jax.train import loop


class PredictorTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = ds_jax.create_model(**micro.MODEL)
    kernel = cls.model.stages[1][0].gate.slim.kernel
    generator = np.random.default_rng(2)
    kernel[...] = jnp.asarray(generator.normal(size=kernel.shape), jnp.float32)
    cls.images = generator.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    cls.predictor = predict.Predictor(
      cls.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
    )

  @parameterized.parameters(1, 7, 40)
  def test_each_image_takes_the_branch_of_its_gate(self, batch_size):
    images = self.images[:batch_size]
    prediction = self.predictor(images)
    floats = (jnp.asarray(images, jnp.float32) / 255 - 0.4) / 0.2
    features = self.model.trunk(floats)
    buckets = np.asarray(self.model.gate_logits(features)).argmax(-1)
    np.testing.assert_array_equal(prediction.buckets, buckets)
    for i, bucket in enumerate(buckets):
      subnet = self.model.routing_space[bucket]
      # A batch of one adds up in another order than a tile.
      np.testing.assert_allclose(
        prediction.logits[i : i + 1],
        self.model(floats[i : i + 1], subnet),
        rtol=1e-4,
        atol=1e-5,
      )
      assert prediction.madds[i] == self.model.cost(subnet, 8).madds
    np.testing.assert_array_equal(
      prediction.labels, prediction.logits.argmax(-1)
    )

  def test_the_test_images_take_several_branches(self):
    assert len(set(self.predictor(self.images).buckets)) > 1

  @parameterized.parameters(0, 2, 3)
  def test_a_bucket_can_be_forced(self, index):
    prediction = self.predictor(self.images[:5], subnet=index)
    floats = (jnp.asarray(self.images[:5], jnp.float32) / 255 - 0.4) / 0.2
    subnet = models.sub_networks(self.model)[index]
    np.testing.assert_allclose(
      prediction.logits, self.model(floats, subnet), rtol=1e-4, atol=1e-5
    )
    assert (prediction.buckets == index).all()

  def test_one_program_for_each_batch_shape(self):
    predictor = predict.Predictor(
      self.model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
    )
    for batch_size in (3, 3, 5, 3):
      predictor(self.images[:batch_size])
    assert predictor._route._cache_size() == 2

  def test_another_size_is_resized_as_in_evaluation(self):
    large = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 3))
    large = large.astype(np.uint8)
    small = np.stack([data.for_evaluation(i, 8) for i in large])
    np.testing.assert_array_equal(
      self.predictor(large).logits, self.predictor(small).logits
    )

  def test_grey_is_repeated(self):
    grey = self.images[:2, :, :, :1]
    np.testing.assert_array_equal(
      self.predictor(grey).logits,
      self.predictor(np.repeat(grey, 3, -1)).logits,
    )

  @parameterized.parameters(
    (np.zeros((8, 8, 3), np.uint8),),
    (np.zeros((1, 8, 8, 3), np.float32),),
    (np.zeros((1, 3, 8, 8), np.uint8),),
    (np.zeros((0, 8, 8, 3), np.uint8),),
  )
  def test_other_images_are_refused(self, images):
    with pytest.raises(ValueError, match='expected one or more'):
      self.predictor(images)

  @parameterized.parameters(-1, 4)
  def test_a_sub_network_that_is_none_is_refused(self, index):
    with pytest.raises(ValueError, match=r'expected 0 \(narrowest\) to 3'):
      self.predictor(self.images[:1], subnet=index)


def test_restores_from_a_run_at_any_stage(tmp_path):
  config = micro.get_config()
  config.dataset.name = micro.write_images(tmp_path)
  config.supernet.num_epochs = 1.0
  config.gate.num_epochs = 1.0
  config.calibrate.num_batches = 2
  config.checkpoint.keep_last = 100
  results = loop.train(config, tmp_path)
  source = data.load_source(config.dataset.name, 'test')
  images = np.stack([example['image'] for example in source])
  labels = np.asarray([example['label'] for example in source])

  predictor = ds_jax.Predictor.restore(tmp_path)
  prediction = predictor(images)
  assert (prediction.labels == labels).mean() == results['routed']['top1']
  np.testing.assert_allclose(
    prediction.madds.mean(), results['routed']['madds'], rtol=1e-9
  )
  for row in results['subnets']:
    forced = predictor(images, subnet=row['index'])
    assert (forced.labels == labels).mean() == row['top1']

  early = checkpoint.restore(checkpoint.directory_of(tmp_path), step=5)
  assert early.meta['stage'] == 'supernet'
  with checkpoint.Checkpointer(
    checkpoint.directory_of(tmp_path / 'early')
  ) as saver:
    saver.save(5, early.tree, early.meta)
  predictor = ds_jax.Predictor.restore(tmp_path / 'early')
  assert predictor(images, subnet=0).logits.shape == (40, 3)
  with pytest.raises(ValueError, match='before Stage II'):
    predictor(images)


def test_restoring_nothing_says_so(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match='No checkpoints in'):
    ds_jax.Predictor.restore(tmp_path / 'nothing')
