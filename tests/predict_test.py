"""The command on files, and a predictor on all that it takes."""

import csv
import io
import json
import pathlib
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import ds_jax
import micro
from ds_jax import predict
from ds_jax.inference import batching

_NAMES = ('ape', 'bee', 'Ž cat')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  micro.save_finished_run(folder, class_names=_NAMES, background=(0, 0, 0))
  return folder


@pytest.fixture(scope='module')
def predictor(workdir):
  return ds_jax.Predictor.restore(workdir)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Of several sizes and formats, in folders; lossless, so that all agree."""
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  for i, name in enumerate(['a.png', 'b.PNG', 'deep/c d.webp', 'deep/é.bmp']):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    pixels = rng.integers(0, 256, (9 + i, 20 - i, 3), np.uint8)
    Image.fromarray(pixels).save(path, lossless=True)
  return folder


def run(capsys, *arguments, stdin=None, monkeypatch=None):
  if stdin is not None:
    monkeypatch.setattr('sys.stdin', io.StringIO(stdin))
  with pytest.raises(SystemExit) as ended:
    predict.main([str(argument) for argument in arguments])
  return ended.value.code, capsys.readouterr()


def files(pictures):
  return sorted(p for p in pictures.rglob('*') if p.is_file())


def test_all_kinds_of_input_agree(predictor, pictures):
  paths = files(pictures)
  opened = [Image.open(path) for path in paths]
  arrays = [np.asarray(image.convert('RGB')) for image in opened]
  expected = predictor(arrays)
  for images in (
    pictures,
    str(pictures),
    paths,
    [str(path) for path in paths],
    opened,
    [path.read_bytes() for path in paths],
    [paths[0], opened[1], paths[2].read_bytes(), arrays[3]],
  ):
    found = predictor(images)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.buckets, expected.buckets)
  one = predictor(paths[0])
  assert len(one) == 1
  np.testing.assert_allclose(one.logits, expected.logits[:1], atol=1e-5)


def test_grey_and_single_pictures(predictor):
  grey = np.arange(2 * 81, dtype=np.uint8).reshape(2, 9, 9, 1)
  np.testing.assert_array_equal(
    predictor(grey).logits, predictor(grey.repeat(3, axis=-1)).logits
  )
  see_through = Image.new('RGBA', (8, 8), (255, 255, 255, 0))
  black = np.zeros((1, 8, 8, 3), np.uint8)
  np.testing.assert_array_equal(
    predictor(see_through).logits, predictor(black).logits
  )


def test_floats_are_refused(predictor):
  for images in (np.zeros((1, 8, 8, 3)), [np.zeros((8, 8, 3), np.float32)]):
    with pytest.raises(ValueError, match='uint8 in 0 .. 255; give pixels'):
      predictor(images)


def test_a_file_that_can_not_be_read_is_named(predictor, tmp_path):
  (tmp_path / 'text.png').write_text('no picture')
  with pytest.raises(ds_jax.data.ImageError, match='text.png is no picture'):
    predictor(tmp_path)
  with pytest.raises(FileNotFoundError, match='nothing.png'):
    predictor(str(tmp_path / 'nothing.png'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='empty: no picture in it'):
    predictor(tmp_path / 'empty')


def test_a_prediction_has_names_and_probabilities(predictor, pictures):
  prediction = predictor(pictures)
  logits = prediction.logits.astype(np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-5)
  assert prediction.class_names == predictor.class_names == _NAMES
  for row, top in zip(expected, prediction.top(2), strict=True):
    order = np.argsort(-row)[:2]
    assert [name for name, _ in top] == [_NAMES[i] for i in order]
    np.testing.assert_allclose([p for _, p in top], row[order], rtol=1e-5)
  assert [len(top) for top in prediction.top(9)] == [3] * 4
  printed = str(prediction).splitlines()
  assert printed[0].split() == ['class', 'probability', 'bucket', 'MAdds']
  assert printed[1].startswith(prediction.top(1)[0][0][0])
  many = predictor(np.zeros((13, 8, 8, 3), np.uint8))
  assert str(many).splitlines()[-1] == '... 3 more'


def test_without_names_a_class_is_a_number(tmp_path):
  micro.save_finished_run(tmp_path)
  predictor = ds_jax.Predictor.restore(tmp_path)
  prediction = predictor(np.zeros((1, 8, 8, 3), np.uint8))
  assert prediction.class_names is None
  ((name, _),) = prediction.top(1)[0]
  assert name == str(prediction.labels[0])


@pytest.mark.parametrize(
  ('count', 'known', 'expected'),
  [
    (1, {}, [1]),
    (1, {4}, [1]),  # not slower for ever than it need be
    (5, {}, [8]),
    (5, {4}, [4, 4]),
    (16, {8}, [16]),
    (17, {16}, [16, 16]),
    (17, {16, 32}, [32]),
    (40, {16}, [64]),
    (256, {}, [256]),
    (600, {}, [256, 256, 128]),
    (600, {256, 64}, [256, 256, 64, 64]),
  ],
)
def test_sizes_of_batches(count, known, expected):
  assert batching.split(count, set(known)) == expected


@pytest.mark.parametrize('subnet', [None, 1])
def test_any_number_compiles_a_few_programs(workdir, subnet):
  predictor = ds_jax.Predictor.restore(workdir)
  images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
  compiled = []

  def note(event, seconds, **kwargs):
    del seconds, kwargs
    if event.endswith('backend_compile_duration'):
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  whole = predictor(images, subnet=subnet)  # 256 and 64
  for count in (1, 2, 16):
    predictor(images[:count], subnet=subnet)
  before = len(compiled)
  for count in (17, 2, 300, 16, 31, 50, 290, 259):
    found = predictor(images[:count], subnet=subnet)
    np.testing.assert_array_equal(found.buckets, whole.buckets[:count])
    np.testing.assert_allclose(
      found.logits, whole.logits[:count], rtol=1e-4, atol=1e-5
    )
  jax.monitoring.unregister_event_duration_listener(note)
  assert len(compiled) == before


def test_features_are_what_the_classifier_reads(predictor):
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  model = predictor.model
  for subnet in (None, 0):
    features = predictor.features(images, subnet=subnet)
    index = model.widest.index if subnet is None else subnet
    width = features.shape[1]
    kernel = np.asarray(model.classifier.kernel[...])[:width]
    logits = features @ kernel + np.asarray(model.classifier.bias[...])
    np.testing.assert_allclose(
      logits, predictor(images, subnet=index).logits, rtol=1e-4, atol=1e-5
    )


def test_threads_may_share_it(workdir):
  predictor = ds_jax.Predictor.restore(workdir)
  images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
  found = [None] * 8

  def work(i):
    found[i] = [predictor(images[i : i + n]) for n in (1, 9, 20)]

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for i, predictions in enumerate(found):
    for n, prediction in zip((1, 9, 20), predictions, strict=True):
      expected = predictor(images[i : i + n])
      np.testing.assert_array_equal(prediction.buckets, expected.buckets)
      np.testing.assert_allclose(
        prediction.logits, expected.logits, rtol=1e-4, atol=1e-5
      )


def test_json_has_a_line_for_each_file(capsys, workdir, predictor, pictures):
  (pictures / 'broken.jpg').write_bytes(b'text')
  first = files(pictures)[0]
  try:
    code, said = run(
      capsys,
      f'--workdir={workdir}',
      '--json',
      '--top=2',
      pictures,
      'gone.png',
      first,
    )
  finally:
    (pictures / 'broken.jpg').unlink()
  assert code == 1
  rows = [json.loads(line) for line in said.out.splitlines()]
  assert [row['path'] for row in rows[-2:]] == ['gone.png', str(first)]
  rows = {row['path']: row for row in rows}
  assert rows['gone.png'] == {
    'path': 'gone.png', 'error': 'gone.png: no such file.',
  }  # fmt: skip
  broken = rows.pop(str(pictures / 'broken.jpg'))
  assert broken.keys() == {'path', 'error'}
  assert 'broken.jpg is no picture' in broken['error']
  rows.pop('gone.png')
  expected = predictor(pictures)
  for i, path in enumerate(files(pictures)):
    row = rows[str(path)]
    assert row['label'] == expected.labels[i]
    assert row['class_name'] == _NAMES[row['label']]
    assert row['bucket'] == expected.buckets[i]
    assert row['madds'] == expected.madds[i]
    assert [name for name, _ in row['top']] == [
      name for name, _ in expected.top(2)[i]
    ]
    assert row['probability'] == pytest.approx(row['top'][0][1])


def test_csv_and_globs_and_standard_input(
  capsys, workdir, pictures, monkeypatch
):
  listed = '\n'.join(str(path) for path in files(pictures)[:2])
  code, said = run(
    capsys, f'--workdir={workdir}', '--csv', pictures / '**' / '*.webp', '-',
    stdin=listed + '\n', monkeypatch=monkeypatch,
  )  # fmt: skip
  assert code == 0
  rows = list(csv.DictReader(io.StringIO(said.out)))
  assert [pathlib.Path(row['path']).name for row in rows] == [
    'c d.webp', 'a.png', 'b.PNG',
  ]  # fmt: skip
  assert all(row['class_name'] in _NAMES for row in rows)


def test_the_table_and_a_budget(capsys, workdir, predictor, pictures):
  code, said = run(
    capsys, f'--workdir={workdir}', '--fraction=0.9', '--router=cascade',
    '--top=3', pictures,
  )  # fmt: skip
  assert code == 0
  expected = predictor.with_budget(fraction=0.9, router='cascade')(pictures)
  lines = said.out.splitlines()
  for line, path, top, bucket in zip(
    lines, files(pictures), expected.top(3), expected.buckets, strict=True
  ):
    named = ', '.join(f'{name} {share:.3f}' for name, share in top)
    assert line == f'{path}: {named} (bucket {bucket})'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--router=cascade'], '--router=cascade needs a budget: --fraction=0.4'),
    (['--top=0'], '--top=0: expected at least 1'),
    (['--subnet=7'], 'subnet=7: expected 0'),
  ],
)
def test_wrong_arguments_are_named(
  capsys, workdir, pictures, arguments, message
):
  code, _ = run(capsys, f'--workdir={workdir}', *arguments, pictures)
  assert message in code


def test_rows_come_while_files_are_read(predictor, pictures):
  """In memory of two batches, whatever the number of files."""
  asked = []

  def paths():
    for i in range(1000):
      asked.append(i)
      yield files(pictures)[i % 4]

  rows = predict.predict_files(predictor, paths())
  next(rows)
  assert len(asked) <= 2 * batching.LIMIT
  assert 1 + sum(1 for _ in rows) == 1000
