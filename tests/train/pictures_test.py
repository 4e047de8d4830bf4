"""A run on a folder of pictures, to named answers."""

import json

import numpy as np
import pytest
from PIL import Image

import ds_jax
import micro
from ds_jax import checkpoint, convert
from ds_jax import config as config_lib
from ds_jax.convert import formats
from ds_jax.convert import statistics as statistics_lib
from ds_jax.data import folders
from ds_jax.train import loop

_NAMES = ('a cat', 'dög', 'eel')


def write(root, counts=(30, 30, 30)):
  """Pictures whose classes are told by a bright stripe."""
  rng = np.random.default_rng(0)
  for split, share in (('train', 1), ('val', 3)):
    for label, (name, count) in enumerate(zip(_NAMES, counts, strict=True)):
      (root / split / name).mkdir(parents=True)
      for i in range(count // share):
        pixels = rng.integers(0, 100, (9, 8, 3)).astype(np.uint8)
        pixels[:, 3 * label : 3 * label + 2] += 120
        Image.fromarray(pixels).save(root / split / name / f'{i}.png')
  (root / 'train/a cat/7.png').write_bytes(b'text')
  (root / 'val/eel/3.png').write_bytes(b'other text')


def make_config(root):
  config = micro.get_config()
  config.model.num_classes = None
  config.dataset.name = f'imagefolder:{root}'
  config.dataset.budget_share = 0.2
  with config.unlocked():
    config.dataset.on_bad_image = 'skip'
  config.supernet.num_epochs = 2.0
  config.calibrate.num_batches = 2
  config.gate.num_epochs = 1.0
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp('pictures')
  workdir = tmp_path_factory.mktemp('run')
  write(root)
  config = make_config(root)
  return root, config, workdir, loop.train(config, workdir)


def test_classes_are_counted_and_named(run):
  _, _, workdir, results = run
  assert results['class_names'] == list(_NAMES)
  assert json.loads((workdir / 'results.json').read_text()) == results
  assert results['num_images'] == 29  # of 30, one is text
  predictor = ds_jax.Predictor.restore(workdir)
  assert predictor.class_names == _NAMES
  assert predictor.model.num_classes == 3


def test_predictions_of_files_are_those_of_the_evaluation(run):
  root, _, workdir, results = run
  source = ds_jax.data.load_source(f'imagefolder:{root}', 'test')
  good = [i for i in range(len(source)) if source.paths[i].stem != '3' or 'eel'
          not in str(source.paths[i])]  # fmt: skip
  predictor = ds_jax.Predictor.restore(workdir)
  prediction = predictor([source.paths[i] for i in good])
  top1 = (prediction.labels == source.labels[good]).mean()
  assert top1 == pytest.approx(results['routed']['top1'])
  assert prediction.top(1)[0][0][0] in _NAMES


def test_it_is_resumed_on_the_same_classes_alone(run, tmp_path):
  root, config, workdir, results = run
  assert loop.train(config, workdir) == results
  (root / 'val/dög').rename(tmp_path / 'val dög')
  (root / 'train/dög').rename(root / 'train/wolf')
  folders.load.cache_clear()
  try:
    message = r"order: \['dög'\] of its 3 are gone, and \['wolf'\] of the 3"
    with pytest.raises(config_lib.ConfigError, match=message):
      loop.train(config, workdir)
  finally:
    (root / 'train/wolf').rename(root / 'train/dög')
    (tmp_path / 'val dög').rename(root / 'val/dög')
    folders.load.cache_clear()


def test_one_picture_more_is_another_run(run):
  root, config, workdir, results = run
  more = root / 'train/eel/more.png'
  Image.new('RGB', (8, 8)).save(more)
  folders.load.cache_clear()
  try:
    message = 'on 30 test, 72 train, 18 budget images, and there are 30 te'
    with pytest.raises(config_lib.ConfigError, match=message):
      loop.train(config, workdir)
  finally:
    more.unlink()
    folders.load.cache_clear()
  assert loop.train(config, workdir) == results


def test_a_run_that_met_a_bad_picture_goes_on_by_skipping(run):
  _, config, workdir, results = run
  config = config.copy_and_resolve_references()
  config.dataset.on_bad_image = 'raise'
  with pytest.raises(ds_jax.data.ImageError, match='val/eel/3.png is no pict'):
    loop.train(config, workdir)
  config.dataset.on_bad_image = 'skip'
  assert loop.train(config, workdir) == results


def test_outputs_without_a_class_have_their_number(run, tmp_path):
  root, _, _, _ = run
  config = make_config(root)
  config.model.num_classes = 3
  config.dataset.name = 'idx:' + micro.write_images(tmp_path).partition(':')[2]
  config.model.num_classes = 5
  with loop.Run(config, tmp_path / 'run') as run:
    assert run._prediction_meta()['class_names'] == ('0', '1', '2', '3', '4')


def statistics(config, workdir):
  with loop.Run(config, workdir) as run:
    meta = run._prediction_meta()
  return tuple(meta['mean']), tuple(meta['std'])


def test_normalisation_follows_the_weights(run, tmp_path):
  root, _, _, _ = run
  config = make_config(root)
  assert statistics(config, tmp_path / 'own') == ((0.5,) * 3, (0.5,) * 3)
  source = tmp_path / 'source'
  micro.save_finished_run(source, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
  config.init = dict(checkpoint=str(source))
  expected = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
  assert statistics(config, tmp_path / 'finetuned') == expected
  with config.unlocked():
    config.dataset.mean = (0.7, 0.7, 0.7)
  expected = (0.7,) * 3, (0.4, 0.5, 0.6)
  assert statistics(config, tmp_path / 'stated') == expected


def test_a_resumed_run_needs_its_source_no_more(run, tmp_path):
  root, _, _, _ = run
  config = make_config(root)
  source = tmp_path / 'source'
  micro.save_finished_run(source, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
  config.init = dict(checkpoint=str(source))
  config.supernet.num_epochs = 0.0
  results = loop.train(config, tmp_path / 'run')
  saved = checkpoint.newest_meta(checkpoint.directory_of(tmp_path / 'run'))
  assert saved['mean'] == [0.1, 0.2, 0.3]
  source.rename(tmp_path / 'gone')
  assert loop.train(config, tmp_path / 'run') == results


@pytest.mark.parametrize(
  ('title', 'name', 'content', 'expected'),
  [
    ("timm's ViT", None, None, None),
    ("torchvision's ResNet-50", None, None, statistics_lib.IMAGENET),
    (
      "timm's ViT",
      'config.json',
      {'pretrained_cfg': {'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}},
      ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)),
    ),
    (
      "Hugging Face's ViT",
      'preprocessor_config.json',
      {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.25, 0.2, 0.3]},
      ((0.5, 0.5, 0.5), (0.25, 0.2, 0.3)),
    ),
  ],
)
def test_files_beside_weights_say_their_statistics(
  tmp_path, title, name, content, expected
):
  (known,) = (known for known in formats.FORMATS if known.title == title)
  if name:
    (tmp_path / name).write_text(json.dumps(content))
  path = str(tmp_path / 'weights.safetensors')
  assert convert.channel_statistics(path, known) == expected


def test_statistics_that_make_no_sense_are_refused(tmp_path):
  path = str(tmp_path / 'weights.safetensors')
  for mean, std, message in (
    (0.5, [0.5] * 3, 'image_mean is 0.5; expected three'),
    ([0.5] * 3, [0.5, 0, 1], r'image_std is \[0.5, 0, 1\]; expected three'),
    ([0.5, None, 1], [1] * 3, 'image_mean is .* expected three numbers'),
  ):
    said = {'image_mean': mean, 'image_std': std}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
      convert.channel_statistics(path, formats.FORMATS[2])
  for nothing in ('[]', '{"pretrained_cfg": null}'):
    (tmp_path / 'preprocessor_config.json').write_text(nothing)
    (tmp_path / 'config.json').write_text(nothing)
    assert convert.channel_statistics(path, formats.FORMATS[2]) is None
  (tmp_path / 'preprocessor_config.json').write_text('{')
  with pytest.raises(ValueError, match='preprocessor_config.json is damaged'):
    convert.channel_statistics(path, formats.FORMATS[2])
