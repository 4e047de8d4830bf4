"""Folders of pictures: what is in them, and what is odd about them."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from ds_jax import config as config_lib
from ds_jax import data
from ds_jax.data import folders, sources


@pytest.fixture(autouse=True)
def fresh():
  folders.load.cache_clear()


@pytest.fixture
def log(caplog):
  caplog.set_level(logging.INFO, logger='absl')
  return caplog


def write(path, value=0, size=(4, 4)):
  """A picture of one colour, that tells which it is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (value % 256, value // 256, 7)).save(path)
  return path


def names(source, root):
  return [path.relative_to(root).as_posix() for path in source.paths]


def load(root, test_share=0.2, drop_copies=True):
  return folders.load(root, test_share, drop_copies)


@pytest.mark.parametrize('test_name', ['val', 'valid', 'validation', 'Test'])
def test_two_splits(tmp_path, test_name):
  write(tmp_path / 'train/a cat/x y.png', 0)
  write(tmp_path / 'train/a cat/deep/er/z.PNG', 1)
  write(tmp_path / 'train/Žluťoučký/é.jpg', 2)
  write(tmp_path / test_name / 'a cat/1.JPeG', 3)
  write(tmp_path / test_name / 'Žluťoučký/2.webp', 4)
  found = load(tmp_path)
  assert found['train'].class_names == ('a cat', 'Žluťoučký')
  assert names(found['train'], tmp_path) == [
    'train/a cat/deep/er/z.PNG',
    'train/a cat/x y.png',
    'train/Žluťoučký/é.jpg',
  ]
  assert found['train'].labels.tolist() == [0, 0, 1]
  assert found['test'].labels.tolist() == [0, 1]
  example = found['train'][1]
  assert example['label'] == 0
  np.testing.assert_array_equal(np.asarray(example['image'])[0, 0], (0, 0, 7))
  info = sources.dataset_info(f'imagefolder:{tmp_path}')
  assert (info.num_train, info.num_test, info.num_classes) == (3, 2, 2)
  assert info.class_names == ('a cat', 'Žluťoučký') and info.labels is None
  assert info.mean == info.std == (0.5, 0.5, 0.5)


def test_of_several_splits_the_test_split_counts(tmp_path, log):
  for i, split in enumerate(['Training', 'val', 'TEST', 'extra']):
    write(tmp_path / split / 'a' / '1.png', i)
  found = load(tmp_path)
  assert names(found['train'], tmp_path) == ['Training/a/1.png']
  assert names(found['test'], tmp_path) == ['TEST/a/1.png']
  assert 'extra, val' in log.text


def test_a_class_may_be_called_like_a_split(tmp_path):
  for i in range(30):
    write(tmp_path / ('bus', 'car', 'train')[i % 3] / f'{i}.png', i)
  found = load(tmp_path)
  assert found['train'].class_names == ('bus', 'car', 'train')
  assert len(found['train']) + len(found['test']) == 30


def test_the_split_by_names_moves_no_other_file(tmp_path):
  for i in range(200):
    write(tmp_path / f'class{i % 2}/{i}.png', i)
  before = load(tmp_path, 0.25)
  assert 30 < len(before['test']) < 70
  every = [*names(before['train'], tmp_path), *names(before['test'], tmp_path)]
  assert sorted(every) == sorted(f'class{i % 2}/{i}.png' for i in range(200))
  for i in range(200, 240):
    write(tmp_path / f'class{i % 2}/{i}.png', i)
  folders.load.cache_clear()
  after = load(tmp_path, 0.25)
  for split in ('train', 'test'):
    old, new = (set(names(f[split], tmp_path)) for f in (before, after))
    assert old < new
  # As it must be on every machine.
  assert names(before['test'], tmp_path)[:4] == FIRST


# By sha256 of the names, computed by `sha256sum`.
FIRST = ['class0/0.png', 'class0/10.png', 'class0/114.png', 'class0/122.png']


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
  for i, name in enumerate(['a/1.png', 'a/2.png', 'a/3.png', 'b/4.png']):
    write(tmp_path / name, i)
  write(tmp_path / '.hidden/5.png')
  write(tmp_path / 'a/.cache/6.png')
  write(tmp_path / 'a/.7.png')
  (tmp_path / 'a/notes.txt').write_text('no picture')
  found = load(tmp_path, 0.5)
  every = {*names(found['train'], tmp_path), *names(found['test'], tmp_path)}
  assert every == {'a/1.png', 'a/2.png', 'a/3.png', 'b/4.png'}


def test_links_are_followed_and_loops_are_not(tmp_path, log):
  elsewhere = tmp_path / 'elsewhere'
  write(elsewhere / 'x.png', 1)
  root = tmp_path / 'root'
  write(root / 'a/1.png', 2)
  os.symlink(elsewhere, root / 'a/linked')
  os.symlink(root / 'a', root / 'a/again')
  os.symlink(elsewhere / 'x.png', root / 'a/y.png')
  assert [p.relative_to(root).as_posix() for p in folders.pictures(root)] == [
    'a/1.png',
    'a/linked/x.png',
    'a/y.png',
  ]
  assert 'a/again leads back to a folder that it is in' in log.text


def test_copies_are_counted_and_named(tmp_path, log):
  for i in range(5):
    write(tmp_path / f'train/a/{i}.png', i)
    write(tmp_path / f'val/a/{i}.png', 100 + i)
  write(tmp_path / 'train/b/other.png', 3)  # of a/3.png
  write(tmp_path / 'val/b/copy.png', 4)  # of train/a/4.png
  write(tmp_path / 'val/b/own.png', 200)
  found = load(tmp_path)
  assert len(found['train']) == 6
  assert 'val/b/copy.png' not in names(found['test'], tmp_path)
  assert len(found['test']) == 6
  assert '2 files are copies of others' in log.text
  assert '2 pictures lie in several classes' in log.text
  assert '1 test pictures are copies of training ones' in log.text
  assert 'val/b/copy.png' in log.text
  assert len(load(tmp_path, drop_copies=False)['test']) == 7


def test_what_is_odd_is_named(tmp_path, log):
  write(tmp_path / 'train/both/1.png', 1)
  write(tmp_path / 'train/only here/2.png', 2)
  write(tmp_path / 'val/both/3.png', 3)
  write(tmp_path / 'val/only there/4.png', 4)
  (tmp_path / 'train/empty').mkdir()
  found = load(tmp_path)
  assert found['test'].class_names == ('both', 'only here', 'only there')
  assert 'no picture in the test split: only here' in log.text
  assert 'no picture in the train split: only there' in log.text
  assert 'are no classes: empty' in log.text


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ((), 'No pictures in .*: expected a sub-folder for each class'),
    (('1.png',), 'No pictures in .*: expected a sub-folder for each class'),
    (('val/a/1.png',), 'has val, but no train with a folder for each class'),
  ],
)
def test_a_folder_without_classes_is_an_error(tmp_path, files, message):
  for name in files:
    write(tmp_path / name)
  with pytest.raises(data.DatasetNotFoundError, match=message):
    data.load_source(f'imagefolder:{tmp_path}', 'train')


def test_no_folder_is_an_error(tmp_path):
  with pytest.raises(data.DatasetNotFoundError, match='There is no folder'):
    data.load_source(f'imagefolder:{tmp_path}/none', 'train')


@pytest.fixture
def mixed(tmp_path):
  """40 pictures, of which three can't be read, one of them at the end."""
  for i in range(40):
    write(tmp_path / f'train/c{i % 3}/{i:02}.png', i, (9, 7))
    write(tmp_path / f'val/c{i % 3}/{i:02}.png', 100 + i, (9, 7))
  for name in ('train/c0/03.png', 'train/c1/10.png', 'train/c2/38.png'):
    (tmp_path / name).write_bytes(b'text')
  whole = (tmp_path / 'val/c1/13.png').read_bytes()
  (tmp_path / 'val/c1/13.png').write_bytes(whole[:50])
  return tmp_path


def config(root, **options):
  options = {
    'image_size': 8, 'batch_size': 8, 'num_threads': 0, 'crop': 'resized',
    'on_bad_image': 'skip', **options,
  }  # fmt: skip
  return config_lib.DataConfig(f'imagefolder:{root}', **options)


def take(batches, count):
  found = [next(batches) for _ in range(count)]
  batches.close()
  return found


def assert_equal(one, other):
  for x, y in zip(one, other, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize('threads', [1, 4])
def test_bad_images_change_nothing_but_themselves(mixed, threads):
  expected = take(data.train_batches(config(mixed), seed=3), 12)
  options = config(mixed, num_threads=threads)
  bad = data.BadImages()
  found = take(data.train_batches(options, seed=3, bad_images=bad), 12)
  assert_equal(found, expected)
  assert len(bad) == 3
  # Resumed in the middle.
  later = take(data.train_batches(options, seed=3, start_step=5), 7)
  assert_equal(later, expected[5:])
  # Two processes.
  halves = [
    take(
      data.train_batches(options, seed=3, process_index=i, process_count=2),
      12,
    )
    for i in range(2)
  ]
  for step, batch in enumerate(expected):
    for name in batch:
      joined = np.concatenate([half[step][name] for half in halves])
      np.testing.assert_array_equal(joined, batch[name])
  # All but those that took the place of a bad one are as without it.
  for name in ('train/c0/03.png', 'train/c1/10.png', 'train/c2/38.png'):
    write(mixed / name, 500, (9, 7))
  folders.load.cache_clear()
  mended = take(data.train_batches(config(mixed), seed=3), 12)
  same = [
    (x == y).all()
    for one, other in zip(expected, mended, strict=True)
    for x, y in zip(one['images'], other['images'], strict=True)
  ]
  assert 0.85 < np.mean(same) < 1


def test_evaluation_counts_each_image_once(mixed):
  batches = list(data.eval_batches(config(mixed, num_threads=2)))
  masks = np.concatenate([batch['mask'] for batch in batches])
  labels = np.concatenate([batch['labels'] for batch in batches])
  source = data.load_source(f'imagefolder:{mixed}', 'test')
  assert len(masks) == len(source) == 40
  (missing,) = np.flatnonzero(~masks)
  assert source.paths[missing].name == '13.png'
  np.testing.assert_array_equal(labels[masks], source.labels[masks])


@pytest.mark.parametrize('threads', [0, 2])
def test_a_bad_image_ends_with_its_name(mixed, threads):
  options = config(mixed, on_bad_image='raise', num_threads=threads)
  message = "c./...png is no picture.*Mend it, or set dataset.on_bad_image='s"
  with pytest.raises(data.ImageError, match=message):
    take(data.train_batches(options, seed=3), 12)
  with pytest.raises(data.ImageError, match='val/c1/13.png can not be read'):
    list(data.eval_batches(options))


def test_no_good_image_is_an_error(tmp_path):
  for i in range(8):
    path = write(tmp_path / f'train/a/{i}.png')
    path.write_bytes(b'text %d' % i)
    write(tmp_path / f'val/a/{i}.png', i)
  with pytest.raises(ValueError, match='No image of the train part of'):
    take(data.train_batches(config(tmp_path), seed=0), 1)
