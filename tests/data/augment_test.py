"""Tests of the augmentations against plain computations."""

import collections
import itertools
from unittest import mock

import numpy as np
from absl.testing import parameterized

from ds_jax.data import augment

GREY = 128
SYMMETRIC = ('color', 'contrast', 'brightness', 'sharpness')
GEOMETRIC = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')


def random_image(height=24, width=20, seed=0, low=0, high=256):
  rng = np.random.default_rng(seed)
  return rng.integers(low, high, (height, width, 3), np.uint8)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)


def apply(name, image, level, operations=None):
  result = (operations or augment.OPERATIONS)[name](image, level)
  assert result.shape == image.shape and result.dtype == np.uint8
  return result


def luma(image):
  """ITU-R 601, float64 (H, W, 1)."""
  return image.astype(float) @ np.array([[0.299], [0.587], [0.114]])


def dull_image(name, image):
  """What the enhancement `name` by a factor of 0 leaves, in float64."""
  if name == 'color':
    return luma(image)
  if name == 'contrast':
    return luma(image).mean()
  return 0.0


def enhanced(name, image, factor):
  dull = dull_image(name, image)
  return np.clip(dull + factor * (image - dull), 0, 255)


def sampled(plane, rows, columns):
  """Interpolates (H, W) bilinearly; NaN where a place is outside."""
  height, width = plane.shape
  top = np.clip(np.floor(rows).astype(int), 0, height - 2)
  left = np.clip(np.floor(columns).astype(int), 0, width - 2)
  down, right = rows - top, columns - left
  upper = plane[top, left] * (1 - right) + plane[top, left + 1] * right
  lower = plane[top + 1, left] * (1 - right) + plane[top + 1, left + 1] * right
  inside = (rows >= 0) & (rows <= height - 1)
  inside &= (columns >= 0) & (columns <= width - 1)
  return np.where(inside, upper * (1 - down) + lower * down, np.nan)


class OperationsTest(parameterized.TestCase):
  @parameterized.parameters('OPERATIONS', 'FALLING_OPERATIONS')
  def test_set_is_timms(self, operations):
    assert sorted(getattr(augment, operations)) == sorted(
      [
        *('autocontrast', 'equalize', 'invert', 'posterize', 'solarize'),
        'solarize_add',
        *SYMMETRIC,
        *GEOMETRIC,
      ]
    )

  @parameterized.parameters(*SYMMETRIC, *GEOMETRIC, 'solarize', 'solarize_add')
  def test_level_zero_changes_nothing(self, name):
    image = random_image()
    np.testing.assert_array_equal(apply(name, image, 0.0), image)

  @parameterized.product(
    name=sorted(augment.OPERATIONS), level=[-1.0, -0.37, 0.0, 0.9, 1.0]
  )
  def test_argument_is_left_alone_and_may_be_a_view(self, name, level):
    image = random_image()
    mirrored = image[:, ::-1]
    result = apply(name, mirrored, level)
    np.testing.assert_array_equal(image, random_image())
    np.testing.assert_array_equal(result, apply(name, mirrored.copy(), level))

  @parameterized.parameters('posterize', 'solarize', 'solarize_add')
  def test_one_sided_operations_ignore_the_sign(self, name):
    image = random_image()
    for level in (0.2, 0.9):
      np.testing.assert_array_equal(
        apply(name, image, level), apply(name, image, -level)
      )


class ValuesTest(parameterized.TestCase):
  def test_invert_is_the_complement_and_twice_nothing(self):
    image = random_image()
    result = apply('invert', image, 0.9)
    assert (result.astype(int) + image == 255).all()
    np.testing.assert_array_equal(apply('invert', result, 0.1), image)

  @parameterized.parameters((0.0, 4), (0.2, 4), (0.5, 2), (0.9, 1), (1.0, 0))
  def test_posterize_keeps_fewer_high_bits_the_higher_the_level(
    self, level, num_kept
  ):
    self.check_kept(apply('posterize', RAMP, level), num_kept)

  def check_kept(self, result, num_kept):
    bits, kept = np.unpackbits(RAMP, -1), np.unpackbits(result, -1)
    bits, kept = bits.reshape(256, 3, 8), kept.reshape(256, 3, 8)
    np.testing.assert_array_equal(kept[..., :num_kept], bits[..., :num_kept])
    assert not kept[..., num_kept:].any()

  # The release's -m9 keeps three bits.
  @parameterized.parameters((0.0, 0), (0.5, 2), (0.9, 3), (-0.9, 3), (1.0, 4))
  def test_falling_posterize_keeps_more_bits_the_higher_the_level(
    self, level, num_kept
  ):
    falling = augment.FALLING_OPERATIONS
    self.check_kept(apply('posterize', RAMP, level, falling), num_kept)

  # And inverts from 230 on.
  @parameterized.parameters((0.0, 0), (0.5, 128), (-0.9, 230), (1.0, 256))
  def test_falling_solarize_has_a_threshold_that_rises(self, level, threshold):
    result = apply('solarize', RAMP, level, augment.FALLING_OPERATIONS)
    for value, solarized in zip(RAMP.ravel(), result.ravel(), strict=True):
      assert solarized == (value if value < threshold else 255 - value)

  @parameterized.product(
    name=['color', 'contrast', 'brightness'], level=[-0.9, 0.0, 0.4, 0.9]
  )
  def test_falling_enhancement_is_by_0_1_to_1_9(self, name, level):
    image = random_image()
    expected = np.round(enhanced(name, image, 0.1 + 1.8 * abs(level)))
    result = apply(name, image, level, augment.FALLING_OPERATIONS)
    np.testing.assert_allclose(result, expected, atol=1)

  @parameterized.parameters((0.5, 55), (-0.9, 99), (1.0, 110))
  def test_solarize_add_brightens_what_is_dark(self, level, added):
    result = apply('solarize_add', RAMP, level)
    for value, brighter in zip(RAMP.ravel(), result.ravel(), strict=True):
      assert brighter == int(value) + (added if value < 128 else 0)

  @parameterized.parameters((0.0, 256), (0.5, 128), (0.9, 26), (1.0, 0))
  def test_solarize_inverts_from_a_threshold_that_falls_with_level(
    self, level, threshold
  ):
    result = apply('solarize', RAMP, level)
    for value, solarized in zip(RAMP.ravel(), result.ravel(), strict=True):
      assert solarized == (value if value < threshold else 255 - value)

  def test_autocontrast_stretches_each_channel(self):
    image = np.stack(
      [
        random_image(low=low, high=high, seed=low)[..., 0]
        for low, high in ((50, 100), (0, 256), (200, 230))
      ],
      axis=-1,
    )
    low, high = image.min((0, 1)).astype(float), image.max((0, 1))
    expected = (image - low) * 255 / (high - low)
    result = apply('autocontrast', image, 0.9)
    np.testing.assert_allclose(result, expected, atol=1)
    # Pillow rounds down.
    assert (result.min((0, 1)) == 0).all() and result.max((0, 1)).min() >= 254

  def test_autocontrast_leaves_a_flat_channel_alone(self):
    image = random_image()
    image[..., 1] = 77
    assert (apply('autocontrast', image, 0.9)[..., 1] == 77).all()

  def test_equalize_spaces_equally_frequent_values_equally(self):
    rng = np.random.default_rng(0)
    values = [(10, 20, 30, 200), (0, 1, 2, 3), (0, 100, 254, 255)]
    image = np.stack(
      [
        rng.permutation(np.repeat(np.array(channel, np.uint8), 255))
        for channel in values
      ],
      axis=-1,
    ).reshape(30, 34, 3)
    result = apply('equalize', image, 0.9)
    for channel, greys in enumerate(values):
      for grey, expected in zip(greys, (0, 85, 170, 255), strict=True):
        chosen = result[..., channel][image[..., channel] == grey]
        assert (chosen == expected).all()

  @parameterized.product(
    name=['color', 'contrast', 'brightness'], level=[-1.0, -0.5, 0.3, 0.9]
  )
  def test_enhancement_equals_the_formula_to_one_level(self, name, level):
    # 0.1 at level -1, 1.9 at 1.
    image = random_image()
    expected = np.round(enhanced(name, image, 1 + 0.9 * level))
    np.testing.assert_allclose(apply(name, image, level), expected, atol=1)

  @parameterized.parameters(-1.0, -0.5, 0.3, 0.9)
  def test_sharpness_moves_away_from_a_smoothed_image(self, level):
    image = random_image()
    height, width = image.shape[:2]
    total = sum(
      image[i : height - 2 + i, j : width - 2 + j].astype(float)
      for i, j in itertools.product(range(3), repeat=2)
    )
    inner = image[1:-1, 1:-1].astype(float)
    # The middle counts five times.
    smooth = (total + 4 * inner) / 13
    expected = np.clip(smooth + (1 + 0.9 * level) * (inner - smooth), 0, 255)
    result = apply('sharpness', image, level)
    np.testing.assert_allclose(
      result[1:-1, 1:-1], np.round(expected), rtol=0, atol=1
    )
    np.testing.assert_array_equal(result[0], image[0])


class GeometryTest(parameterized.TestCase):
  @parameterized.product(axis=[0, 1], pixels=[-9, -4, -1, 1, 2, 9])
  def test_translation_by_whole_pixels_is_a_shift(self, axis, pixels):
    # 0.45 of 20 pixels is nine.
    image = random_image(20, 20)
    name = ('translate_y', 'translate_x')[axis]
    result = apply(name, image, pixels / 9)
    shifted = np.roll(image, -pixels, axis).swapaxes(0, axis)
    blank = slice(-pixels, None) if pixels > 0 else slice(None, -pixels)
    shifted[blank] = GREY
    np.testing.assert_allclose(
      result, shifted.swapaxes(0, axis), rtol=0, atol=1
    )

  def test_translation_goes_by_the_side_along_its_axis(self):
    image = random_image(20, 40, low=129)
    for name, axis, pixels in (('translate_x', 1, 18), ('translate_y', 0, 9)):
      grey = (apply(name, image, 1.0) == GREY).all((1 - axis, 2))
      assert grey.sum() == pixels and grey[-pixels:].all()

  @parameterized.parameters((3.0, 1), (-3.0, -1), (6.0, 2))
  def test_three_levels_are_a_right_angle(self, level, quarter_turns):
    image = random_image(20, 20)
    expected = np.rot90(image, quarter_turns)
    np.testing.assert_array_equal(apply('rotate', image, level), expected)

  @parameterized.product(
    name=['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'],
    level=[-1.0, -0.4, 0.7, 1.0],
  )
  def test_pixels_come_from_where_the_geometry_says(self, name, level):
    height, width = 40, 30
    rows, columns = np.mgrid[:height, :width].astype(float)
    plane = 2 * rows + 3 * columns + 20
    image = plane.astype(np.uint8)[:, :, None].repeat(3, 2)
    sources = {
      'rotate': self.rotated(rows, columns, np.deg2rad(30 * level)),
      'shear_x': (rows, columns + 0.3 * level * (rows + 0.5)),
      'shear_y': (rows + 0.3 * level * (columns + 0.5), columns),
      'translate_x': (rows, columns + 0.45 * level * width),
      'translate_y': (rows + 0.45 * level * height, columns),
    }
    expected = sampled(plane, *sources[name])
    result = apply(name, image, level)
    inside = ~np.isnan(expected)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(
      result[inside], expected[inside][:, None].repeat(3, 1), rtol=0, atol=1
    )
    # A source half a pixel outside still counts as the rim's.
    outside = np.isnan(
      sampled(np.pad(plane, 1), *(1 + np.stack(sources[name])))
    )
    assert outside.any() and (result[outside] == GREY).all()

  @staticmethod
  def rotated(rows, columns, angle):
    """Where a pixel was before the image was turned counter-clockwise."""
    y, x = rows - rows.mean(), columns - columns.mean()
    return (
      np.cos(angle) * y + np.sin(angle) * x + rows.mean(),
      np.cos(angle) * x - np.sin(angle) * y + columns.mean(),
    )


class RandAugmentTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.calls = []
    recorders = {
      name: self.recorder(name, operation)
      for name, operation in augment.OPERATIONS.items()
    }
    self.enterContext(mock.patch.dict(augment.OPERATIONS, recorders))

  def recorder(self, name, operation):
    def record(image, level):
      self.calls.append((name, level))
      return operation(image, level)

    return record

  def test_layers_are_applied_half_of_the_time_and_operations_evenly(self):
    image, rng = random_image(4, 4), np.random.default_rng(0)
    counts = collections.Counter()
    for _ in range(1400):
      before = len(self.calls)
      augment.rand_augment(image, rng, 2, 9.0)
      counts[len(self.calls) - before] += 1
    # Binomial: 350, 700, 350; within five standard deviations.
    assert abs(counts[1] - 700) < 95 and abs(counts[0] - 350) < 81
    assert set(counts) == {0, 1, 2}
    names = collections.Counter(name for name, _ in self.calls)
    assert len(names) == 15 and min(names.values()) > 55
    assert max(names.values()) < 145

  @parameterized.parameters((5.0, 0.5), (9.0, 0.9), (0.0, 0.0), (10.0, 1.0))
  def test_level_is_a_tenth_of_the_magnitude_give_or_take(
    self, magnitude, expected
  ):
    augment.rand_augment(
      random_image(4, 4), np.random.default_rng(0), 4000, magnitude
    )
    levels = np.array([level for _, level in self.calls])
    assert abs(levels).max() <= 1
    assert abs(np.median(abs(levels)) - expected) < 0.01
    assert abs((levels < 0).mean() - (levels > 0).mean()) < 0.11
    if magnitude == 5:
      assert abs(abs(levels).std() - 0.05) < 0.004

  def test_result_is_the_operations_in_turn(self):
    image = random_image()
    result = augment.rand_augment(image, np.random.default_rng(4), 6, 9.0)
    calls, expected = list(self.calls), image
    assert len(calls) > 1
    for name, level in calls:
      expected = augment.OPERATIONS[name](expected, level)
    np.testing.assert_array_equal(result, expected)

  def test_falling_operations_are_as_many_and_drawn_alike(self):
    names = []
    falling = augment.FALLING_OPERATIONS
    for name in falling:

      def record(image, level, name=name):
        del level
        names.append(name)
        return image

      self.enterContext(mock.patch.dict(falling, {name: record}))
    for increasing in (True, False):
      rng = np.random.default_rng(0)
      augment.rand_augment(random_image(4, 4), rng, 50, 9.0, increasing)
    assert names == [name for name, _ in self.calls] and len(set(names)) > 5

  def test_seed_decides_and_shape_stays(self):
    image = random_image(17, 23)
    results = [
      augment.rand_augment(image, np.random.default_rng(seed), 2, 9.0)
      for seed in (*range(30), *range(30))
    ]
    for one, other in zip(results[:30], results[30:], strict=True):
      assert one.shape == (17, 23, 3) and one.dtype == np.uint8
      np.testing.assert_array_equal(one, other)
    assert len({result.tobytes() for result in results}) > 15
    np.testing.assert_array_equal(image, random_image(17, 23))


class ColorJitterTest(parameterized.TestCase):
  def test_equals_the_formulas_in_the_drawn_order(self):
    orders = set()
    names = ('brightness', 'contrast', 'color')
    for seed in range(40):
      image = random_image(seed=seed, low=40, high=180)
      rng = np.random.default_rng(seed)
      order = rng.permutation(3)
      factors = rng.uniform(0.8, 1.2, 3)
      expected = image.astype(float)
      for i in order:
        # One level for each step, as each gives bytes.
        expected = np.round(enhanced(names[i], expected, factors[i]))
      result = augment.color_jitter(image, np.random.default_rng(seed), 0.2)
      np.testing.assert_allclose(result, expected, rtol=0, atol=3)
      orders.add(tuple(order))
    assert len(orders) == 6

  def test_brightness_factor_is_uniform_in_the_range(self):
    # Contrast and colour leave a grey image alone.
    image = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    results = [augment.color_jitter(image, rng, 0.4) for _ in range(800)]
    factors = np.array([result[0, 0, 0] for result in results]) / 100
    assert 0.59 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.41
    assert abs(factors.mean() - 1) < 0.04
    counts, _ = np.histogram(factors, 4, (0.59, 1.41))
    assert counts.min() > 140

  def test_no_strength_changes_nothing(self):
    image = random_image()
    result = augment.color_jitter(image, np.random.default_rng(0), 0.0)
    np.testing.assert_array_equal(result, image)

  def test_full_strength_stays_in_bytes(self):
    image, rng = random_image(17, 23), np.random.default_rng(0)
    for _ in range(50):
      result = augment.color_jitter(image, rng, 1.0)
      assert result.shape == (17, 23, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(image, random_image(17, 23))

  def test_seed_decides(self):
    image = random_image()
    one, same, other = (
      augment.color_jitter(image, np.random.default_rng(seed), 0.4)
      for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


class RandomErasingTest(parameterized.TestCase):
  @staticmethod
  def box(image, erased):
    """Bounds of what changed, and the share of it that did."""
    changed = (image != erased).any(-1)
    rows, columns = (
      np.flatnonzero(changed.any(1)),
      np.flatnonzero(changed.any(0)),
    )
    inside = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return rows[0], columns[0], *inside.shape, inside.mean()

  def test_one_box_within_the_ranges_and_nothing_outside(self):
    image, rng = random_image(200, 160), np.random.default_rng(0)
    areas, ratios, tops, lefts = [], [], [], []
    for _ in range(400):
      erased = augment.random_erasing(image, rng, 1.0)
      assert erased.shape == image.shape and erased.dtype == np.uint8
      top, left, height, width, share = self.box(image, erased)
      # All of the box is new: a pixel is the same by chance of 256^-3.
      assert share > 0.999
      areas.append(height * width / (200 * 160))
      ratios.append(width / height)
      tops.append(top / (200 - height))
      lefts.append(left / (160 - width) if width < 160 else 0.5)
    # Sides are whole pixels, so the ends of the ranges give a little.
    assert 0.019 < min(areas) < 0.03 and 0.31 < max(areas) < 0.34
    assert 0.29 < min(ratios) < 0.33 and 2.9 < max(ratios) < 3.5
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.03
    for places in (tops, lefts):
      assert min(places) < 0.05 and max(places) > 0.95
      assert abs(np.mean(places) - 0.5) < 0.08
    np.testing.assert_array_equal(image, random_image(200, 160))

  def test_noise_is_uniform_and_differs_from_pixel_to_pixel(self):
    image = np.zeros((300, 300, 3), np.uint8)
    erased = augment.random_erasing(image, np.random.default_rng(0), 1.0)
    top, left, height, width, _ = self.box(image, erased)
    noise = erased[top : top + height, left : left + width].reshape(-1, 3)
    assert abs(noise.mean() - 127.5) < 2 and abs(noise.std() - 73.9) < 2
    assert len(np.unique(noise)) == 256
    correlation = np.corrcoef(noise.T) - np.eye(3)
    assert abs(correlation).max() < 0.05

  def test_normal_noise_has_the_data_set_s_statistics(self):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = np.zeros((300, 300, 3), np.uint8)
    erased = augment.random_erasing(
      image, np.random.default_rng(0), 1.0, (mean, std)
    )
    top, left, height, width, _ = self.box(image, erased)
    noise = erased[top : top + height, left : left + width].reshape(-1, 3)
    assert len(noise) > 5000
    normalised = (noise / 255 - mean) / std
    for channel, values in enumerate(normalised.T):
      # Cut where bytes end: 0.018 to 0.036 lie beyond each end.
      low, high = ((end - mean[channel]) / std[channel] for end in (0, 1))
      expected = np.clip(
        np.random.RandomState(channel).normal(size=10**6), low, high
      )
      error = 5 * expected.std() / np.sqrt(len(noise))
      assert abs(values.mean() - expected.mean()) < error
      assert abs(values.std() - expected.std()) < error
      # Fractions below, by the normal distribution alone.
      for quantile, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        found = (values < quantile).mean()
        # Bytes are a sixtieth of a deviation apart.
        assert abs(found - share) < 0.01 + 2.5 / np.sqrt(len(noise))
    correlation = np.corrcoef(noise.T) - np.eye(3)
    assert abs(correlation).max() < 0.05

  @parameterized.parameters(0.0, 0.2, 0.7, 1.0)
  def test_is_as_frequent_as_asked(self, probability):
    image, rng = random_image(8, 8), np.random.default_rng(0)
    erased = sum(
      (augment.random_erasing(image, rng, probability) != image).any()
      for _ in range(1000)
    )
    tolerance = 5 * np.sqrt(1000 * probability * (1 - probability))
    assert abs(erased - 1000 * probability) <= tolerance

  def test_image_too_narrow_for_a_box_is_left_alone(self):
    image = random_image(1, 400)
    result = augment.random_erasing(image, np.random.default_rng(0), 1.0)
    np.testing.assert_array_equal(result, image)

  def test_seed_decides(self):
    image = random_image()
    one, same, other = (
      augment.random_erasing(image, np.random.default_rng(seed), 1.0)
      for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_read_only_images_are_accepted():
  image, rng = random_image(), np.random.default_rng(0)
  image.flags.writeable = False
  for _ in range(20):
    result = augment.rand_augment(image, rng, 3, 9.0)
    result = augment.color_jitter(result, rng, 0.4)
    result = augment.random_erasing(result, rng, 0.5)
    assert result.shape == image.shape
