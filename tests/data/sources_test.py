"""Tests of the sources by name; TFDS copies are real files, made here."""

import functools
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl.testing import parameterized
from PIL import Image
from sklearn import datasets

from ds_jax import config as config_lib
from ds_jax import data
from ds_jax.data import sources

DIGITS_LABELS = [
  [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8],
  [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7],
]


def encoded(image: Image.Image, file_format: str) -> bytes:
  content = io.BytesIO()
  image.save(content, file_format)
  return content.getvalue()


def write_tfds_copy(
  data_dir,
  name,
  version,
  splits,
  encoding,
  num_classes,
  keys=('image', 'label'),
  **features,
):
  """Writes splits of (encoded image, label) as TFDS itself would.

  Returns the copy's folder.
  """
  folder = pathlib.Path(data_dir) / name / version
  folder.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name.split('/')[0],
      version=tfds.core.Version(version),
      data_dir=str(folder),
      module_name='',
    ),
    features=tfds.features.FeaturesDict(
      {
        keys[0]: tfds.features.Image(encoding_format=encoding),
        keys[1]: tfds.features.ClassLabel(num_classes=num_classes),
        **features,
      }
    ),
  )
  # Two examples a file, so that an index has to find its file.
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=2, file_format='array_record'
  )
  writer.initialize_splits(list(splits))
  for split, examples in splits.items():
    for image, label in examples:
      example = {keys[0]: io.BytesIO(image), keys[1]: label}
      writer.add_examples({split: [example]})
  writer.close_all()
  return folder


def write_cifar10(data_dir, images, version='3.0.2'):
  """Five train and two test images, with labels 9, 8, ..."""
  examples = [
    (encoded(Image.fromarray(image), 'PNG'), 9 - i)
    for i, image in enumerate(images)
  ]
  splits = {'train': examples[:5], 'test': examples[5:]}
  return write_tfds_copy(data_dir, 'cifar10', version, splits, 'png', 10)


class DigitsTest(parameterized.TestCase):
  def test_sizes_and_info(self):
    info = sources.dataset_info('digits')
    assert (info.num_train, info.num_test, info.num_classes) == (1437, 360, 10)
    example = data.load_source('digits', 'train')[0]
    assert example['image'].shape == (32, 32, 3)
    assert example['image'].dtype == np.uint8

  def test_split_is_the_one_written_down(self):
    # Changing it would make every published number wrong.
    labels = [
      [data.load_source('digits', split)[i]['label'] for i in range(12)]
      for split in ('train', 'test')
    ]
    assert labels == DIGITS_LABELS

  def test_splits_are_disjoint_and_together_the_whole(self):
    pixels = [
      data.load_source('digits', split)[i]['image'].tobytes()
      for split, size in (('train', 1437), ('test', 360))
      for i in range(size)
    ]
    assert len(set(pixels)) == len(pixels) == 1797

  def test_images_are_the_digits_interpolated_with_their_labels(self):
    originals = datasets.load_digits()
    # Bilinear: output pixel centres, in the input's pixels, clamped at the rim.
    places = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(8)[None]))
    expected = weights @ originals.images @ weights.T * 255 / 16
    source = data.load_source('digits', 'train')
    for i in range(30):
      image, label = source[i]['image'], source[i]['label']
      distances = np.abs(expected - image[..., 0]).max((1, 2))
      assert distances.min() < 2
      assert originals.target[distances.argmin()] == label
      assert (image == image[..., :1]).all()

  def test_loading_again_gives_the_same_object(self):
    first = data.load_source('digits', 'test')
    assert data.load_source('digits', 'test') is first
    assert repr(first) == 'GreySource(digits, test)'


class TfdsTest(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def make_data(self, tmp_path: pathlib.Path):
    self.data_dir = str(tmp_path)
    rng = np.random.default_rng(0)
    self.images = rng.integers(0, 256, (7, 32, 32, 3), np.uint8)

  def test_array_record_copy_is_read_back(self):
    write_cifar10(self.data_dir, self.images)
    for split, start, size in (('train', 0, 5), ('test', 5, 2)):
      source = data.load_source('cifar10', split, self.data_dir)
      assert len(source) == size
      for i in range(size):
        np.testing.assert_array_equal(
          source[i]['image'], self.images[start + i]
        )
        assert source[i]['label'] == 9 - start - i
    info = sources.dataset_info('cifar10', self.data_dir)
    assert (info.num_train, info.num_test, info.num_classes) == (5, 2, 10)
    assert info.mean == (0.4914, 0.4822, 0.4465)

  def test_reading_does_not_import_tensorflow(self):
    write_cifar10(self.data_dir, self.images)
    program = (
      'import sys\n'
      'from ds_jax import data\n'
      f'source = data.load_source("cifar10", "train", {self.data_dir!r})\n'
      'print(source[4]["label"], "tensorflow" in sys.modules)'
    )
    result = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True
    )
    assert result.stdout == '5 False\n', result.stderr

  def test_newest_version_is_read(self):
    write_cifar10(self.data_dir, self.images, '3.0.2')
    write_cifar10(self.data_dir, 255 - self.images, '3.0.10')
    source = data.load_source('cifar10', 'train', self.data_dir)
    np.testing.assert_array_equal(source[1]['image'], 255 - self.images[1])

  def test_imagenet_test_split_is_validation_and_images_are_rgb(self):
    red = Image.new('RGB', (20, 10), (255, 0, 0))
    examples = [
      (encoded(red.convert(mode), 'JPEG'), label)
      for label, mode in enumerate(['RGB', 'L', 'CMYK'])
    ]
    splits = {'train': examples[:1], 'validation': examples}
    write_tfds_copy(
      self.data_dir, 'imagenet2012', '5.1.0', splits, 'jpeg', 1000
    )
    source = data.load_source('imagenet2012', 'test', self.data_dir)
    assert [source[i]['label'] for i in range(3)] == [0, 1, 2]
    for i, colour in enumerate([(254, 0, 0), (76, 76, 76), (254, 0, 0)]):
      assert source[i]['image'].shape == (10, 20, 3)
      pixels = np.asarray(source[i]['image'])
      np.testing.assert_allclose(pixels[5, 10], colour, atol=3)

  @parameterized.parameters(
    ('cifar10', []),
    ('imagenet2012', ['ILSVRC2012_img_val.tar', '--manual_dir=']),
  )
  def test_missing_copy_error_tells_where_and_how(self, name, parts):
    with pytest.raises(data.DatasetNotFoundError) as error:
      data.load_source(name, 'train', self.data_dir)
    for part in (
      f'{self.data_dir}/{name}',
      f'tfds build {name} --file_format=array_record'
      f' --data_dir={self.data_dir}',
      '.[tf]',
      '--config.dataset.name=digits',
      'configs/ds_digits.py',
      *parts,
    ):
      assert part in str(error.value)
    assert isinstance(error.value, FileNotFoundError)

  def test_tfrecord_copy_error_tells_how_to_get_array_record(self):
    folder = write_cifar10(self.data_dir, self.images)
    info_path = folder / 'dataset_info.json'
    info = json.loads(info_path.read_text())
    info_path.write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
    with pytest.raises(data.DatasetNotFoundError, match='is tfrecord') as error:
      data.load_source('cifar10', 'train', self.data_dir)
    assert str(folder) in str(error.value)
    assert '--file_format=array_record' in str(error.value)
    assert (
      f'tfds convert_format --dataset_version_dir={folder}'
      ' --out_file_format=array_record --out_dir=DIR/cifar10/3.0.2'
    ) in str(error.value)

  def test_unfinished_copy_is_not_read(self):
    folder = write_cifar10(self.data_dir, self.images)
    folder.rename(folder.with_name('incomplete.AB12_3.0.2'))
    with pytest.raises(data.DatasetNotFoundError, match='not found'):
      data.load_source('cifar10', 'train', self.data_dir)

  def test_copy_without_the_split_is_refused(self):
    examples = [(encoded(Image.new('RGB', (8, 8)), 'JPEG'), 0)]
    write_tfds_copy(
      self.data_dir, 'imagenet2012', '5.1.0', {'train': examples}, 'jpeg', 1000
    )
    with pytest.raises(
      data.DatasetNotFoundError, match="no split 'validation'"
    ):
      data.load_source('imagenet2012', 'test', self.data_dir)


class TestAnyTfds:
  @pytest.fixture(autouse=True)
  def copy(self, tmp_path):
    self.data_dir = str(tmp_path)
    self.colours = [(40 * i, 7, 200 - 40 * i) for i in range(5)]
    self.examples = [
      (encoded(Image.new('RGB', (6, 5), colour), 'PNG'), i % 3)
      for i, colour in enumerate(self.colours)
    ]

  def write(self, splits, name='birds/small', version='1.2.0'):
    write_tfds_copy(
      self.data_dir, name, version, splits, 'png', 3, ('photo', 'species')
    )

  @pytest.mark.parametrize('name', ['birds/small', 'birds/small:1.2.0'])
  @pytest.mark.parametrize('test', ['test', 'validation'])
  def test_image_and_label_are_found_by_their_features(self, name, test):
    self.write({'train': self.examples[:3], test: self.examples[3:]})
    for split, start, size in (('train', 0, 3), ('test', 3, 2)):
      source = data.load_source(f'tfds:{name}', split, self.data_dir)
      assert len(source) == size
      for i in range(size):
        pixels = np.asarray(source[i]['image'])
        assert pixels.shape == (5, 6, 3)
        assert tuple(pixels[0, 0]) == self.colours[start + i]
        assert source[i]['label'] == (start + i) % 3
    info = sources.dataset_info(f'tfds:{name}', self.data_dir)
    assert info.class_names == ('0', '1', '2') and info.num_classes == 3

  def test_labels_that_are_kept_back_are_none(self):
    kept_back = [(image, -1) for image, _ in self.examples]
    self.write(
      {
        'train': self.examples[:3],
        'test': kept_back,
        'validation': self.examples[3:],
      }
    )
    source = data.load_source('tfds:birds/small', 'test', self.data_dir)
    assert len(source) == 2 and source[0]['label'] == 0

  def test_without_any_labels_the_train_split_is_split(self):
    kept_back = [(image, -1) for image, _ in self.examples]
    self.write({'train': self.examples * 20, 'test': kept_back})
    train, test = (
      data.load_source('tfds:birds/small', split, self.data_dir)
      for split in ('train', 'test')
    )
    assert len(train) + len(test) == 100 and len(test) > 8

  def test_a_version_of_a_known_set_has_its_facts(self):
    mean, _ = sources.channel_statistics('tfds:imagenet2012:5.1.0')
    assert mean == (0.485, 0.456, 0.406)

  def test_another_version_is_not_taken(self):
    self.write({'train': self.examples, 'test': self.examples})
    with pytest.raises(data.DatasetNotFoundError, match='small/2.0.0/dataset_'):
      data.load_source('tfds:birds/small:2.0.0', 'train', self.data_dir)

  def test_a_set_without_a_test_split_is_split(self):
    self.write({'train': self.examples * 20})
    sizes = {}
    for split in ('train', 'test'):
      source = data.load_source('tfds:birds/small', split, self.data_dir)
      sizes[split] = len(source)
      assert source.class_names == ('0', '1', '2')
    assert sizes['train'] + sizes['test'] == 100 and 8 < sizes['test'] < 33

  def test_a_set_of_two_images_is_refused(self):
    write_tfds_copy(
      self.data_dir, 'pairs', '1.0.0', {'train': []}, 'png', 3,
      other=tfds.features.Image(encoding_format='png'),
    )  # fmt: skip
    with pytest.raises(ValueError, match='expected one image and one class'):
      data.load_source('tfds:pairs', 'train', self.data_dir)


class TestHuggingFace:
  def write(self, folder, splits, **columns):
    import datasets as hf

    features = hf.Features(
      {
        'img': hf.Image(),
        'kind': hf.ClassLabel(names=['cat', 'dog']),
        **columns,
      }
    )
    hf.DatasetDict(
      {
        split: hf.Dataset.from_dict(
          {
            'img': [
              {'bytes': encoded(Image.new('RGB', (6, 5), (i, 7, 9)), 'PNG')}
              for i in rows
            ],
            'kind': [i % 2 for i in rows],
            **{name: [None] * len(rows) for name in columns},
          },
          features=features,
        )
        for split, rows in splits.items()
      }
    ).save_to_disk(str(folder))

  def test_image_and_label_are_found_by_their_features(self, tmp_path):
    self.write(tmp_path, {'train': range(5), 'validation': range(5, 8)})
    for split, start, size in (('train', 0, 5), ('test', 5, 3)):
      source = data.load_source(f'hf:{tmp_path}', split)
      assert len(source) == size
      for i in range(size):
        example = source[i]
        assert tuple(np.asarray(example['image'])[0, 0]) == (start + i, 7, 9)
        assert example['label'] == (start + i) % 2
    info = sources.dataset_info(f'hf:{tmp_path}')
    assert info.class_names == ('cat', 'dog')

  def test_one_split_is_split(self, tmp_path):
    self.write(tmp_path, {'train': range(100)})
    train, test = (
      data.load_source(f'hf:{tmp_path}', split, test_share=0.5)
      for split in ('train', 'test')
    )
    assert len(train) + len(test) == 100 and 30 < len(test) < 70
    assert train.class_names == ('cat', 'dog')

  def test_a_set_of_two_images_is_refused(self, tmp_path):
    import datasets as hf

    self.write(tmp_path, {'train': range(2)}, other=hf.Image())
    with pytest.raises(ValueError, match=r"columns \['img', 'other'\] and the"):
      data.load_source(f'hf:{tmp_path}', 'train')

  def test_what_is_not_there_or_not_installed_is_said(
    self, tmp_path, monkeypatch
  ):
    with pytest.raises(data.DatasetNotFoundError, match='save_to_disk'):
      data.load_source(f'hf:{tmp_path}', 'train')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[hf\]'"):
      data.load_source(f'hf:{tmp_path}/other', 'train')


_OWN = """
import numpy as np
from PIL import Image

class Source:
  class_names = ('low', 'high')

  def __init__(self, split):
    self.start = {'train': 0, 'test': 100}[split]

  def __len__(self):
    return 20

  def __getitem__(self, index):
    value = self.start + index
    return {'image': np.full((4, 4, 3), value, np.uint8), 'label': index % 2}

def make(split):
  return Source(split)

def plain(split):
  return [{'image': np.zeros((4, 4, 3), np.uint8), 'label': i} for i in (0, 4)]

def wrong(split):
  return 3

def pictures(split):
  image = Image.new('L', (5, 4), 77)
  return [{'image': image, 'label': i} for i in (0, 1)]

def floats(split):
  return [{'image': np.zeros((4, 4, 3)), 'label': i} for i in (0, 1)]
"""


class TestOwn:
  @pytest.fixture(autouse=True)
  def module(self, tmp_path, monkeypatch):
    (tmp_path / 'own_pictures.py').write_text(_OWN)
    monkeypatch.syspath_prepend(tmp_path)

  def test_a_source_of_one_s_own(self):
    source = data.load_source('own_pictures:make', 'test')
    assert source[3]['image'][0, 0, 0] == 103
    info = sources.dataset_info('own_pictures:make')
    assert info.class_names == ('low', 'high') and info.labels is None

  def test_labels_are_read_where_nothing_names_them(self):
    info = sources.dataset_info('own_pictures:plain')
    assert info.labels == (0, 4) and info.num_classes == 5
    assert info.class_names == ('0', '1', '2', '3', '4')

  def test_it_may_give_images_of_pillow_but_no_floats(self):
    options = dict(image_size=4, batch_size=2, num_threads=0, crop=None)
    train = functools.partial(data.train_batches, seed=0)
    config = config_lib.DataConfig('own_pictures:pictures', **options)
    for open_batches in (train, data.eval_batches):
      assert (next(open_batches(config))['images'] == 77).all()
    config = config_lib.DataConfig('own_pictures:floats', **options)
    for open_batches in (train, data.eval_batches):
      batches = open_batches(config)
      with pytest.raises(ValueError, match='dtype float64: expected uint8'):
        next(batches)

  @pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
      ('own_pictures:wrong', ValueError, 'returned a int; expected an object'),
      (
        'own_pictures:none',
        ImportError,
        "no attribute 'none'. Expected a func",
      ),
      ('no_such_module:make', ImportError, "No module named 'no_such_module'"),
    ],
  )
  def test_what_is_no_source_is_refused(self, name, error, message):
    with pytest.raises(error, match=message):
      data.load_source(name, 'train')


class NamesTest(parameterized.TestCase):
  @parameterized.parameters('mnist', 'digits:x', 'idx', 'cifar10:x')
  def test_unknown_name_error_lists_the_known(self, name):
    with pytest.raises(ValueError, match='known: digits, idx:DIR, imagefolder'):
      data.load_source(name, 'train')

  def test_unknown_split_is_refused(self):
    with pytest.raises(ValueError, match="'validation'; known: 'train'"):
      data.load_source('digits', 'validation')

  def test_channel_statistics_need_no_data(self):
    mean, std = sources.channel_statistics('imagenet2012')
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
    assert sources.channel_statistics('idx:/nowhere') == (
      (0.5,) * 3,
      (0.5,) * 3,
    )
