"""Tests of the transforms against plain computations."""

import tracemalloc

import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from ds_jax.data import transforms


def random_image(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 256, (height, width, 3), np.uint8)


def ramp(height, width):
  """An image whose first channels tell the row and the column."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


class RandomCropTest(parameterized.TestCase):
  def test_is_a_window_of_the_zero_padded_image_and_reaches_all(self):
    image = random_image(6, 5)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {
      padded[top : top + 6, left : left + 5].tobytes(): (top, left)
      for top in range(5)
      for left in range(5)
    }
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
      crop = transforms.random_crop(image, rng, padding=2)
      assert crop.shape == (6, 5, 3) and crop.dtype == np.uint8
      seen.add(windows[crop.tobytes()])
    assert len(seen) == 25

  def test_no_padding_changes_nothing(self):
    image = random_image(6, 5)
    crop = transforms.random_crop(image, np.random.default_rng(0), padding=0)
    np.testing.assert_array_equal(crop, image)


class RandomFlipTest(parameterized.TestCase):
  def test_mirrors_half_of_the_images(self):
    image, rng = random_image(4, 5), np.random.default_rng(0)
    mirrored = 0
    for _ in range(1000):
      flipped = transforms.random_flip(image, rng)
      if (flipped == image).all():
        continue
      for column in range(5):
        np.testing.assert_array_equal(flipped[:, column], image[:, 4 - column])
      mirrored += 1
    assert 430 < mirrored < 570


class RandomResizedCropTest(parameterized.TestCase):
  def test_whole_square_image_is_only_resized(self):
    image = random_image(20, 20)
    crop = transforms.random_resized_crop(
      image, np.random.default_rng(0), 8, scale=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(crop, transforms.resize(image, 8, 8))

  def test_area_and_ratio_stay_in_range_and_fill_it(self):
    # A ramp's slope after resizing to S tells how many pixels S covers.
    image, rng = ramp(200, 240), np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(400):
      crop = transforms.random_resized_crop(image, rng, 32, scale=(0.1, 0.5))
      assert crop.shape == (32, 32, 3)
      crop = crop.astype(float)
      height = (crop[24, 16, 0] - crop[8, 16, 0]) * 2
      width = (crop[16, 24, 1] - crop[16, 8, 1]) * 2
      areas.append(height * width / (200 * 240))
      ratios.append(width / height)
    assert 0.08 < min(areas) < 0.14 and 0.45 < max(areas) < 0.53
    assert 0.70 < min(ratios) < 0.80 and 1.25 < max(ratios) < 1.42
    assert abs(np.mean(np.log(ratios))) < 0.03

  def test_long_image_falls_back_to_a_centred_crop(self):
    image = ramp(4, 200)
    crop = transforms.random_resized_crop(
      image, np.random.default_rng(0), 4, scale=(1.0, 1.0)
    )
    # 4 * 4 / 3 is 5 columns: 97 to 101.
    assert crop[..., 1].min() >= 97 and crop[..., 1].max() <= 101


class EvaluationTest(parameterized.TestCase):
  def test_image_of_the_right_size_is_left_alone(self):
    image = random_image(16, 16)
    result = transforms.for_evaluation(image, 16, crop_ratio=0.5)
    np.testing.assert_array_equal(result, image)

  @parameterized.parameters((64, 96), (96, 64), (64, 64))
  def test_keeps_the_centre_of_the_short_side(self, height, width):
    result = transforms.for_evaluation(ramp(height, width), 16, crop_ratio=0.5)
    assert result.shape == (16, 16, 3)
    # Short side 64 -> 32, and 16 of it are kept: 32 source pixels a side. The
    # mean of two pixels lies half-way, and is rounded.
    expected = np.arange(32).reshape(16, 2).mean(1)
    rows = expected + (height - 32) / 2
    columns = expected + (width - 32) / 2
    np.testing.assert_allclose(result[:, 8, 0], rows, atol=0.51)
    np.testing.assert_allclose(result[8, :, 1], columns, atol=0.51)

  def test_shrinking_is_antialiased(self):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = transforms.for_evaluation(stripes, 16)
    assert result[:, 2:-2].min() > 110 and result[:, 2:-2].max() < 145

  def test_imagenet_size_is_exact_whatever_the_source(self):
    for height, width in ((375, 500), (500, 333), (257, 257), (100, 900)):
      result = transforms.for_evaluation(ramp(height, width), 224, 0.875)
      assert result.shape == (224, 224, 3)

  @parameterized.product(
    sides=[(96, 64), (375, 500), (37, 33), (20, 31), (224, 300)],
    crop_ratio=[1.0, 0.875, 0.5],
    interpolation=['bilinear', 'bicubic'],
  )
  def test_is_a_crop_of_the_whole_resized(
    self, sides, crop_ratio, interpolation
  ):
    image = random_image(*sides)
    short = round(24 / crop_ratio)
    height, width = (round(side * short / min(sides)) for side in sides)
    kind = getattr(Image.Resampling, interpolation.upper())
    whole = np.asarray(Image.fromarray(image).resize((width, height), kind))
    top, left = (height - 24) // 2, (width - 24) // 2
    expected = whole[top : top + 24, left : left + 24].astype(int)
    found = transforms.for_evaluation(image, 24, crop_ratio, interpolation)
    # A resized value is rounded; its weights may differ in their last digit.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.05

  @parameterized.parameters((1, 10_000), (10_000, 1), (3, 30_000), (1, 1))
  def test_memory_is_that_of_source_and_result(self, height, width):
    image = random_image(height, width)
    tracemalloc.start()
    result = transforms.for_evaluation(image, 224, 0.875, 'bicubic')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.shape == (224, 224, 3)
    # Resized as a whole the first would have 256 x 2,560,000 pixels.
    assert peak < 4 * (image.nbytes + result.nbytes)

  @parameterized.parameters((0, 5), (5, 0), (0, 0))
  def test_an_image_without_pixels_is_refused(self, height, width):
    image = np.zeros((height, width, 3), np.uint8)
    with pytest.raises(ValueError, match=f'of {height} x {width} pixels: exp'):
      transforms.for_evaluation(image, 8)


class InterpolationTest(parameterized.TestCase):
  @parameterized.parameters(*transforms.INTERPOLATIONS)
  def test_a_random_crop_has_it_too(self, interpolation):
    image = random_image(40, 30)
    found, box = (
      run(np.random.default_rng(3))
      for run in (
        lambda rng: transforms.random_resized_crop(
          image, rng, 16, interpolation=interpolation
        ),
        lambda rng: transforms.random_box(
          40, 30, rng, (0.08, 1.0), (3 / 4, 4 / 3)
        ),
      )
    )
    top, left, height, width = box
    crop = Image.fromarray(image[top : top + height, left : left + width])
    kind = getattr(Image.Resampling, interpolation.upper())
    np.testing.assert_array_equal(found, crop.resize((16, 16), kind))


class NormalizeTest(parameterized.TestCase):
  def test_equals_numpy(self):
    images = np.stack([random_image(4, 5, seed) for seed in range(3)])
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    result = transforms.normalize(images, mean, std)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
