"""Tests of the batches: order, shares of processes, resuming, masks."""

import collections
import dataclasses
import itertools
import pathlib
import struct
import threading
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import data
from ds_jax.data import augment

# 1,437 images in train and 360 in test.
CONFIG = config_lib.DataConfig('digits', batch_size=100)
PLAIN = dataclasses.replace(CONFIG, crop=None, flip=False)
AUGMENTED = dataclasses.replace(
  CONFIG, randaugment_layers=2, color_jitter=0.4, erasing_probability=0.5
)


def take(batches, count):
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def pixels(batches):
  """The images as bytes: digits are all different."""
  return [image.tobytes() for batch in batches for image in batch['images']]


def assert_equal_batches(left, right):
  assert len(left) == len(right) > 0
  for one, other in zip(left, right, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def source_pixels(split):
  source = data.load_source('digits', split)
  return [source[i]['image'].tobytes() for i in range(len(source))]


def write_idx_train(folder, images, labels):
  for name, values in (('images-idx3', images), ('labels-idx1', labels)):
    header = struct.pack(
      f'>I{values.ndim}I', 0x800 + values.ndim, *values.shape
    )
    (folder / f'train-{name}-ubyte').write_bytes(header + values.tobytes())


class TrainBatchesTest(parameterized.TestCase):
  def test_shapes_and_types(self):
    (batch,) = take(data.train_batches(CONFIG, seed=0), 1)
    assert batch['images'].shape == (100, 32, 32, 3)
    assert batch['images'].dtype == np.uint8
    assert batch['labels'].shape == (100,)
    assert batch['labels'].dtype == np.int32

  @parameterized.parameters('pad', 'resized')
  def test_resumed_batches_equal_the_uninterrupted(self, crop):
    config = dataclasses.replace(CONFIG, crop=crop)
    # Step 17 lies in the second epoch.
    whole = take(data.train_batches(config, seed=3), 20)
    resumed = take(data.train_batches(config, seed=3, start_step=17), 3)
    assert_equal_batches(whole[17:], resumed)

  @parameterized.parameters(0, 1, 7)
  def test_batches_do_not_depend_on_threads(self, num_threads):
    config = dataclasses.replace(CONFIG, num_threads=num_threads)
    expected = take(data.train_batches(CONFIG, seed=3), 5)
    assert_equal_batches(expected, take(data.train_batches(config, seed=3), 5))

  def test_read_ahead_is_bounded_in_bytes(self):
    # A row of 512 x 512 pixels is 0.75 MiB, a batch 12, four of them a piece.
    config = dataclasses.replace(
      CONFIG, image_size=512, batch_size=16, num_threads=4, crop=None
    )
    for mib, most_ahead in ((24, 2 * 16), (30, 2 * 16 + 8), (1, 16)):
      read = []

      def counted(config, image, view=data.pipeline.for_evaluation, read=read):
        read.append(1)
        return view(config, image)

      with mock.patch.object(data.pipeline, 'for_evaluation', counted):
        batches = data.train_batches(
          dataclasses.replace(config, read_ahead_mib=mib), seed=0
        )
        next(batches)
        count = 0
        while count < len(read):  # until nobody reads
          count = len(read)
          time.sleep(0.3)
        batches.close()
      assert len(read) <= 16 + most_ahead
      # All threads have work, and the next batch is ready.
      assert len(read) >= 16 + 16

  def test_several_threads_prepare_a_batch(self):
    # Unlike any other test's, whose threads may not have ended yet.
    config = dataclasses.replace(PLAIN, num_threads=4, crop_padding=7)
    view, threads = data.pipeline.for_evaluation, set()

    def together(given, image):
      if given == config:
        threads.add(threading.get_ident())
        time.sleep(0.005)  # long enough for the others to begin
      return view(given, image)

    with mock.patch.object(data.pipeline, 'for_evaluation', together):
      found = take(data.train_batches(config, seed=0), 1)
    assert 1 < len(threads) <= 4
    assert_equal_batches(found, take(data.train_batches(PLAIN, seed=0), 1))

  @parameterized.parameters(2, 4)
  def test_processes_share_the_batches_of_one(self, count):
    whole = take(data.train_batches(CONFIG, seed=0), 16)
    shares = [
      take(
        data.train_batches(
          CONFIG, seed=0, process_index=i, process_count=count
        ),
        16,
      )
      for i in range(count)
    ]
    for step, batch in enumerate(whole):
      for i in range(count):
        for key in batch:
          np.testing.assert_array_equal(
            shares[i][step][key], np.split(batch[key], count)[i]
          )

  def test_processes_read_disjoint_images_that_cover_the_epoch(self):
    config = dataclasses.replace(PLAIN, batch_size=1436)
    one, two = (
      pixels(
        take(
          data.train_batches(config, seed=0, process_index=i, process_count=2),
          1,
        )
      )
      for i in range(2)
    )
    assert not set(one) & set(two)
    assert len(set(one) | set(two)) == 1436

  def test_each_epoch_has_every_image_once_in_a_new_order(self):
    stream = pixels(take(data.train_batches(PLAIN, seed=0), 44))
    epochs = [stream[i * 1437 : (i + 1) * 1437] for i in range(3)]
    train = sorted(source_pixels('train'))
    for epoch in epochs:
      assert sorted(epoch) == train
    assert len({tuple(epoch) for epoch in [*epochs, train]}) == 4

  def test_labels_stay_with_their_images(self):
    source = data.load_source('digits', 'train')
    label_of = {
      source[i]['image'].tobytes(): source[i]['label']
      for i in range(len(source))
    }
    batches = take(data.train_batches(PLAIN, seed=1), 3)
    labels = np.concatenate([batch['labels'] for batch in batches])
    assert [label_of[image] for image in pixels(batches)] == labels.tolist()

  def test_seed_changes_order_and_is_not_the_next_epoch_of_another(self):
    config = dataclasses.replace(PLAIN, batch_size=1437)
    zero = take(data.train_batches(config, seed=0), 2)
    (one,) = take(data.train_batches(config, seed=1), 1)
    for batch in zero:
      assert (batch['images'] != one['images']).any()

  def test_augmentation_changes_from_epoch_to_epoch(self):
    config = dataclasses.replace(CONFIG, batch_size=1437)
    first, second = take(data.train_batches(config, seed=0), 2)
    same = set(pixels([first])) & set(pixels([second]))
    # By chance one in 81 crops x 2 flips comes again; some digits' pixels also
    # stay within the crop.
    assert len(same) < 60

  def test_close_ends_the_threads(self):
    before = set(threading.enumerate())
    batches = data.train_batches(CONFIG, seed=0)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    started = set(threading.enumerate()) - before
    for thread in started:
      thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)

  @parameterized.parameters(
    ({'batch_size': 1438}, 1, 'larger than the train part .* 1437'),
    ({'batch_size': 100}, 3, '100 does not divide among 3'),
  )
  def test_unusable_batch_size_is_refused_at_once(self, options, count, text):
    config = dataclasses.replace(CONFIG, **options)
    with pytest.raises(ValueError, match=text):
      data.train_batches(config, seed=0, process_count=count)

  def test_process_index_must_be_below_the_count(self):
    with pytest.raises(ValueError, match='process_index 2 is not in 0 .. 1'):
      data.train_batches(CONFIG, seed=0, process_index=2, process_count=2)


class RepeatsTest(parameterized.TestCase):
  CONFIG = dataclasses.replace(CONFIG, batch_size=96, num_repeats=3)

  def test_a_batch_has_each_image_three_times(self):
    config = dataclasses.replace(self.CONFIG, crop=None, flip=False)
    once = dataclasses.replace(config, batch_size=32, num_repeats=1)
    batches = take(data.train_batches(config, seed=0), 16)
    expected = take(data.train_batches(once, seed=0), 16)
    for batch, images in zip(batches, expected, strict=True):
      for i in range(3):
        part = {name: np.split(x, 3)[i] for name, x in batch.items()}
        assert_equal_batches([part], [images])

  def test_an_epoch_has_a_third_of_the_images_and_the_next_the_others(self):
    config = dataclasses.replace(
      self.CONFIG, batch_size=1437, crop=None, flip=False
    )
    seen = [
      set(pixels([b])) for b in take(data.train_batches(config, seed=0), 3)
    ]
    assert [len(epoch) for epoch in seen] == [479] * 3
    assert set().union(*seen) == set(source_pixels('train'))

  @parameterized.parameters(1, 2)
  def test_each_copy_is_augmented_on_its_own(self, num_views):
    (batch,) = take(
      data.train_batches(self.CONFIG, seed=0, num_views=num_views), 1
    )
    views = [x for name, x in batch.items() if name != 'labels']
    assert len(views) == num_views
    copies = np.concatenate([x.reshape(3, 32, -1) for x in views])
    for i, j in itertools.combinations(range(len(copies)), 2):
      # Of 81 crops x 2 flips two are the same by chance.
      assert (copies[i] == copies[j]).all(-1).sum() < 5

  @parameterized.parameters(0, 4)
  def test_batches_do_not_depend_on_threads(self, num_threads):
    config = dataclasses.replace(self.CONFIG, num_threads=num_threads)
    one = dataclasses.replace(self.CONFIG, num_threads=1)
    expected = take(data.train_batches(one, seed=3), 4)
    assert_equal_batches(expected, take(data.train_batches(config, seed=3), 4))

  def test_processes_share_the_batches_of_one(self):
    whole = take(data.train_batches(self.CONFIG, seed=0), 4)
    shares = [
      take(
        data.train_batches(
          self.CONFIG, seed=0, process_index=i, process_count=2
        ),
        4,
      )
      for i in range(2)
    ]
    joined = [
      {key: np.concatenate([one[key], two[key]]) for key in one}
      for one, two in zip(*shares, strict=True)
    ]
    assert_equal_batches(whole, joined)

  # The order's second epoch begins in step 44, the run's in 14.
  @parameterized.parameters(1, 15, 44)
  def test_resumed_batches_equal_the_uninterrupted(self, start_step):
    whole = take(data.train_batches(self.CONFIG, seed=3), 46)
    resumed = take(
      data.train_batches(self.CONFIG, seed=3, start_step=start_step), 2
    )
    assert_equal_batches(whole[start_step : start_step + 2], resumed)

  def test_what_is_not_augmented_is_not_repeated(self):
    once = dataclasses.replace(self.CONFIG, num_repeats=1)
    batches, expected = (
      take(data.train_batches(config, seed=0, is_augmented=False), 2)
      for config in (self.CONFIG, once)
    )
    assert_equal_batches(batches, expected)

  def test_a_batch_that_does_not_hold_the_repeats_is_refused(self):
    with pytest.raises(ValueError, match='batch_size=128 .* num_repeats=3 tim'):
      config_lib.DataConfig('digits', batch_size=128, num_repeats=3)


class PartsTest(parameterized.TestCase):
  CONFIG = dataclasses.replace(PLAIN, gate_share=0.1, budget_share=0.2)

  def pixels_of(self, part):
    source = data.load_part(self.CONFIG, part)
    return [source[i]['image'].tobytes() for i in range(len(source))]

  def test_parts_are_disjoint_and_make_up_the_train_split(self):
    parts = {part: self.pixels_of(part) for part in ('train', 'gate', 'budget')}
    sizes = {part: len(images) for part, images in parts.items()}
    assert sizes == {'train': 1437 - 144 - 287, 'gate': 144, 'budget': 287}
    together = sum(parts.values(), [])
    assert sorted(together) == sorted(source_pixels('train'))

  def test_images_of_each_part_are_counted(self):
    assert data.num_images(CONFIG) == {'test': 360, 'train': 1437}
    config = dataclasses.replace(CONFIG, gate_share=0.1, budget_share=0.2)
    parts = {'test': 360, 'train': 1006, 'gate': 144, 'budget': 287}
    assert data.num_images(config) == parts

  def test_parts_are_random_samples(self):
    source = data.load_part(self.CONFIG, 'budget')
    labels = np.bincount([source[i]['label'] for i in range(len(source))])
    assert len(labels) == 10 and labels.min() > 15

  def test_without_shares_train_is_the_split_itself(self):
    assert data.load_part(PLAIN, 'train') is data.load_source('digits', 'train')
    assert self.pixels_of('test') == source_pixels('test')

  @parameterized.parameters('train', 'gate')
  def test_training_reads_its_part_alone(self, part):
    config = dataclasses.replace(self.CONFIG, batch_size=72)
    batches = take(data.train_batches(config, seed=0, part=part), 40)
    assert set(pixels(batches)) == set(self.pixels_of(part))

  def test_evaluation_reads_a_part_in_order(self):
    batches = list(data.eval_batches(self.CONFIG, 'budget'))
    assert len(batches) == data.num_eval_batches(self.CONFIG, 'budget') == 3
    masks = np.concatenate([batch['mask'] for batch in batches])
    images = [i for i, kept in zip(pixels(batches), masks, strict=True) if kept]
    assert images == self.pixels_of('budget')

  def test_images_may_be_left_as_for_evaluation(self):
    config = dataclasses.replace(CONFIG, gate_share=0.1)
    batches = take(
      data.train_batches(config, seed=0, part='gate', is_augmented=False), 2
    )
    assert set(pixels(batches)) <= set(self.pixels_of('gate'))

  def test_an_empty_part_and_an_unknown_one_are_refused(self):
    with pytest.raises(ValueError, match="gate part of 'digits' is empty"):
      data.load_part(PLAIN, 'gate')
    with pytest.raises(ValueError, match="Unknown part 'validation'"):
      data.load_part(PLAIN, 'validation')

  @parameterized.parameters((1.0, 0.0), (0.5, 0.5), (-0.1, 0.0), (0.0, -0.1))
  def test_shares_that_leave_nothing_are_refused(self, gate, budget):
    with pytest.raises(ValueError, match='_share is out of range'):
      config_lib.DataConfig('digits', gate_share=gate, budget_share=budget)


class ViewsTest(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def make_folder(self, tmp_path: pathlib.Path):
    self.folder = tmp_path

  @parameterized.parameters(
    *({'crop': crop} for crop in (None, 'pad', 'resized')),
    {'randaugment_layers': 2, 'color_jitter': 0.4, 'erasing_probability': 0.5},
  )
  def test_first_view_is_the_only_one_of_a_single_view(self, **options):
    config = dataclasses.replace(CONFIG, **options)
    one = take(data.train_batches(config, seed=3), 16)
    two = take(data.train_batches(config, seed=3, num_views=2), 16)
    for batch in two:
      assert batch['teacher_images'].shape == (100, 32, 32, 3)
      assert batch['teacher_images'].dtype == np.uint8
      del batch['teacher_images']
    assert_equal_batches(one, two)

  def test_views_are_two_draws_from_the_same_image(self):
    # The crop keeps the middle of an image, which tells it.
    labels = np.arange(50, dtype=np.uint8)
    images = np.broadcast_to(200 - labels[:, None, None], (50, 32, 32))
    write_idx_train(self.folder, images, labels)
    config = config_lib.DataConfig(f'idx:{self.folder}', batch_size=50)
    batches = take(data.train_batches(config, seed=0, num_views=2), 4)
    for batch in batches:
      for view in ('images', 'teacher_images'):
        middle = batch[view][:, 16, 16, 0]
        np.testing.assert_array_equal(200 - middle, batch['labels'])
    # A constant image's views are the same by chance of 1 in 81.
    same = [
      (batch['images'] == batch['teacher_images']).all((1, 2, 3)).sum()
      for batch in batches
    ]
    assert sum(same) < 12

  def test_views_are_flipped_independently(self):
    config = dataclasses.replace(
      CONFIG, batch_size=1437, crop=None, num_threads=0
    )
    plain = dataclasses.replace(PLAIN, batch_size=1437)
    (batch,) = take(data.train_batches(config, seed=0, num_views=2), 1)
    (original,) = take(data.train_batches(plain, seed=0), 1)
    flips = collections.Counter()
    for first, second, image in zip(
      batch['images'], batch['teacher_images'], original['images'], strict=True
    ):
      flipped = [(view != image).any() for view in (first, second)]
      for view, mirrored in zip((first, second), flipped, strict=True):
        step = -1 if mirrored else 1
        np.testing.assert_array_equal(view, image[:, ::step])
      flips[tuple(flipped)] += 1
    # Independent: a quarter each.
    assert len(flips) == 4 and min(flips.values()) > 280

  @parameterized.parameters(CONFIG, AUGMENTED)
  def test_resumed_views_equal_the_uninterrupted(self, config):
    whole = take(data.train_batches(config, seed=3, num_views=2), 20)
    resumed = take(
      data.train_batches(config, seed=3, start_step=17, num_views=2), 3
    )
    assert_equal_batches(whole[17:], resumed)

  @parameterized.parameters(CONFIG, AUGMENTED)
  def test_processes_share_both_views_of_one(self, config):
    whole = take(data.train_batches(config, seed=0, num_views=2), 16)
    shares = [
      take(
        data.train_batches(
          config, seed=0, process_index=i, process_count=2, num_views=2
        ),
        16,
      )
      for i in range(2)
    ]
    joined = [
      {key: np.concatenate([one[key], two[key]]) for key in one}
      for one, two in zip(*shares, strict=True)
    ]
    assert_equal_batches(whole, joined)

  @parameterized.parameters(0, 3, -1, None)
  def test_other_numbers_of_views_are_refused_at_once(self, num_views):
    with pytest.raises(ValueError, match='num_views .* neither 1 nor 2'):
      data.train_batches(CONFIG, seed=0, num_views=num_views)


class AugmentationTest(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def make_folder(self, tmp_path: pathlib.Path):
    self.folder = tmp_path

  def test_what_is_off_is_not_called(self):
    names = ('rand_augment', 'color_jitter', 'random_erasing')
    for name in names:
      self.enterContext(
        mock.patch.object(augment, name, side_effect=AssertionError)
      )
    take(data.train_batches(CONFIG, seed=0, num_views=2), 2)

  @parameterized.parameters(
    ({'randaugment_layers': 2}, 'rand_augment', (2, 9.0, True)),
    (
      {
        'randaugment_layers': 3,
        'randaugment_magnitude': 4.0,
        'randaugment_increasing': False,
      },
      'rand_augment',
      (3, 4.0, False),
    ),
    ({'color_jitter': 0.3}, 'color_jitter', (0.3,)),
    ({'erasing_probability': 0.7}, 'random_erasing', (0.7, None)),
    (
      {'erasing_probability': 0.7, 'erasing_noise': 'normal'},
      'random_erasing',
      (0.7, ((0.5,) * 3, (0.5,) * 3)),
    ),
  )
  def test_option_follows_crop_and_flip(self, options, name, arguments):
    config = dataclasses.replace(CONFIG, num_threads=0, **options)
    function = self.enterContext(
      mock.patch.object(
        augment, name, side_effect=lambda image, *_: 255 - image
      )
    )
    (batch,) = take(data.train_batches(config, seed=0), 1)
    (plain,) = take(data.train_batches(CONFIG, seed=0), 1)
    np.testing.assert_array_equal(batch['images'], 255 - plain['images'])
    for call in function.call_args_list:
      assert call.args[2:] == arguments

  def test_order_is_randaugment_then_jitter_then_erasing(self):
    called = []
    for name in ('rand_augment', 'color_jitter', 'random_erasing'):

      def record(image, *_, name=name):
        called.append(name)
        return image

      self.enterContext(mock.patch.object(augment, name, record))
    config = dataclasses.replace(AUGMENTED, batch_size=2, num_threads=0)
    take(data.train_batches(config, seed=0), 1)
    assert called[:6] == ['rand_augment', 'color_jitter', 'random_erasing'] * 2

  @parameterized.parameters(
    {'randaugment_layers': 2}, {'color_jitter': 0.4}, {'erasing_probability': 1}
  )
  def test_images_of_a_batch_get_different_draws(self, **options):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32), np.uint8)
    images = np.broadcast_to(image, (64, 32, 32))
    write_idx_train(self.folder, images, np.zeros(64, np.uint8))
    config = config_lib.DataConfig(
      f'idx:{self.folder}', batch_size=64, crop=None, flip=False, **options
    )
    (batch,) = take(data.train_batches(config, seed=0), 1)
    assert len(set(pixels([batch]))) > 25

  def test_augmented_batches_do_not_depend_on_threads(self):
    expected = take(data.train_batches(AUGMENTED, seed=3), 4)
    for num_threads in (0, 5):
      config = dataclasses.replace(AUGMENTED, num_threads=num_threads)
      batches = take(data.train_batches(config, seed=3), 4)
      assert_equal_batches(expected, batches)

  def test_source_images_stay_as_they_were(self):
    before = source_pixels('train')
    config = dataclasses.replace(
      AUGMENTED, crop=None, flip=False, batch_size=1437
    )
    take(data.train_batches(config, seed=0, num_views=2), 1)
    assert source_pixels('train') == before

  def test_evaluation_is_not_augmented(self):
    assert_equal_batches(
      list(data.eval_batches(AUGMENTED)), list(data.eval_batches(CONFIG))
    )


class EvalBatchesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('test', 100, 4), ('test', 90, 4), ('train', 479, 3)
  )
  def test_every_image_once_in_order(self, split, batch_size, num_batches):
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    batches = list(data.eval_batches(config, split))
    assert len(batches) == data.num_eval_batches(config, split) == num_batches
    assert {batch['images'].shape for batch in batches} == {
      (batch_size, 32, 32, 3)
    }
    mask = np.concatenate([batch['mask'] for batch in batches])
    expected = source_pixels(split)
    assert mask.dtype == bool and mask.sum() == len(expected)
    seen = itertools.compress(pixels(batches), mask)
    assert list(seen) == expected
    assert not batches[-1]['images'][~batches[-1]['mask']].any()

  def test_shares_of_processes_concatenate_to_the_global_batch(self):
    # 360 = 3 * 104 + 48: the last process has nothing of the last batch.
    config = dataclasses.replace(CONFIG, batch_size=104)
    whole = list(data.eval_batches(config))
    shares = [
      list(data.eval_batches(config, process_index=i, process_count=2))
      for i in range(2)
    ]
    joined = [
      {key: np.concatenate([one[key], two[key]]) for key in one}
      for one, two in zip(*shares, strict=True)
    ]
    assert not shares[1][-1]['mask'].any()
    assert_equal_batches(whole, joined)

  @parameterized.parameters((0, 4), (1, 3), (3, 1), (4, 0))
  def test_batches_begin_at_the_step(self, start_step, count):
    # The last of the four is part full.
    whole = list(data.eval_batches(CONFIG))
    rest = list(data.eval_batches(CONFIG, start_step=start_step))
    assert len(rest) == count
    if count:
      assert_equal_batches(whole[start_step:], rest)

  def test_processes_begin_at_the_step_together(self):
    for index in range(2):
      options = dict(process_index=index, process_count=2)
      whole = list(data.eval_batches(CONFIG, **options))
      rest = list(data.eval_batches(CONFIG, start_step=2, **options))
      assert_equal_batches(whole[2:], rest)

  def test_images_are_brought_to_size(self):
    config = dataclasses.replace(CONFIG, image_size=24, crop_ratio=0.75)
    batch = next(data.eval_batches(config))
    image = data.load_source('digits', 'test')[7]['image']
    # 24 / 0.75 is the image's own size, so this only crops.
    np.testing.assert_array_equal(batch['images'][7], image[4:28, 4:28])


class DataConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    {'crop': 'random'},
    {'image_size': 0},
    {'batch_size': 0},
    {'crop_padding': -1},
    {'crop_scale': (0.5, 0.2)},
    {'crop_ratio': 1.5},
    {'num_threads': -1},
    {'randaugment_layers': -1},
    {'randaugment_magnitude': 10.5},
    {'randaugment_magnitude': -1.0},
    {'color_jitter': -0.1},
    {'color_jitter': 1.1},
    {'erasing_probability': -0.1},
    {'erasing_probability': 1.5},
    {'erasing_probability': float('nan')},
    {'erasing_noise': 'pixel'},
    {'mixup_alpha': -0.1},
    {'mixup_alpha': float('inf')},
    {'cutmix_alpha': -0.1},
    {'cutmix_alpha': float('nan')},
    {'mix_probability': 1.1},
    {'mix_switch_probability': -0.5},
    {'num_repeats': 0},
  )
  def test_value_out_of_range_is_refused(self, **options):
    (option,) = options
    with pytest.raises(ValueError, match=option):
      config_lib.DataConfig('digits', **options)


def test_crop_and_flip_are_drawn_per_image():
  config = dataclasses.replace(CONFIG, batch_size=1437, crop_padding=1)
  plain = dataclasses.replace(PLAIN, batch_size=1437)
  (augmented,) = take(data.train_batches(config, seed=0), 1)
  (images,) = take(data.train_batches(plain, seed=0), 1)
  places = collections.Counter()
  for i in range(600):
    result = augmented['images'][i]
    padded = np.pad(images['images'][i], ((1, 1), (1, 1), (0, 0)))
    places.update(
      (top, left, step)
      for top in range(3)
      for left in range(3)
      for step in (1, -1)
      if (padded[top : top + 32, left : left + 32][:, ::step] == result).all()
    )
  assert len(places) == 18 and min(places.values()) > 10
