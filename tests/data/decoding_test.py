"""Files made on the spot, against what Pillow says of the pixels."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from ds_jax import config as config_lib
from ds_jax import data, inference
from ds_jax.data import decoding, transforms


def encoded(image, form='PNG', **options):
  content = io.BytesIO()
  image.save(content, form, **options)
  return content.getvalue()


def photo(width=40, height=30, seed=0):
  """A smooth picture, as JPEG takes them."""
  small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def with_alpha(mode='RGBA'):
  image = photo().convert(mode)
  alpha = Image.linear_gradient('L').resize(image.size)
  image.putalpha(alpha)
  return image


def over(image, background):
  """What is seen, computed in floats."""
  pixels = np.asarray(image.convert('RGBA')).astype(float)
  alpha = pixels[..., 3:] / 255
  return pixels[..., :3] * alpha + np.array(background) * (1 - alpha)


def see_through_palette():
  image = photo().quantize(16)
  image.info['transparency'] = 3
  return image


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF'])
def test_every_format_gives_pillow_s_pixels(form):
  content = encoded(photo(), form)
  expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
  picture = data.Picture(content)
  assert picture.shape == (30, 40, 3)
  np.testing.assert_array_equal(picture, expected)
  assert picture.pixels().dtype == np.uint8


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'CMYK', 'YCbCr'])
def test_every_mode_gives_pillow_s_pixels(mode):
  image = photo().quantize(16) if mode == 'P' else photo().convert(mode)
  form = {'CMYK': 'JPEG', 'YCbCr': 'JPEG'}.get(mode, 'PNG')
  content = encoded(image, form)
  expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
  np.testing.assert_array_equal(data.Picture(content), expected)


@pytest.mark.parametrize('background', [(255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize(
  'image',
  [with_alpha(), with_alpha('L'), see_through_palette()],
  ids=['RGBA', 'LA', 'palette'],
)
def test_what_is_transparent_shows_the_background(image, background):
  content = encoded(image, **image.info)
  picture = data.Picture(content, background=background)
  opened = Image.open(io.BytesIO(content))
  assert opened.has_transparency_data
  np.testing.assert_allclose(
    np.asarray(picture).astype(float), over(opened, background), atol=1.01
  )


def test_16_bits_keep_the_upper_ones():
  values = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50
  picture = data.Picture(encoded(Image.fromarray(values)))
  expected = np.repeat((values >> 8)[..., None], 3, axis=-1)
  np.testing.assert_array_equal(picture, expected)


def test_an_animation_is_its_first_frame():
  frames = [photo(seed=k).quantize(16) for k in range(3)]
  content = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
  np.testing.assert_array_equal(data.Picture(content), expected)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [None, (8, 8)])
def test_a_picture_is_upright(orientation, size):
  stored = photo(80, 60)
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = encoded(stored, 'JPEG', exif=exif, quality=95, subsampling=0)
  # Where the stored rows and columns are, by the EXIF standard.
  rows_and_columns = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
  }
  as_stored = np.asarray(Image.open(io.BytesIO(content)))
  upright = rows_and_columns[orientation](as_stored)
  picture = data.Picture(content)
  assert picture.shape == upright.shape
  if size is None:
    np.testing.assert_array_equal(picture, upright)
    return
  found = transforms.resize(picture, *size)
  expected = transforms.resize(upright, *size)
  np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=6)


@pytest.mark.parametrize('form', ['PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_every_format_is_turned_once(form, orientation):
  """As Pillow's own function for it does."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = encoded(photo(20, 12), form, exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
  expected = np.asarray(upright.convert('RGB'))
  picture = data.Picture(content)
  assert picture.shape == expected.shape
  np.testing.assert_array_equal(picture, expected)
  opened = Image.open(io.BytesIO(content))
  np.testing.assert_array_equal(decoding.rgb(opened), expected)


@pytest.mark.parametrize('size', [100, 60, 30, 20])
def test_a_reduced_scale_gives_much_the_same(size):
  picture = data.Picture(encoded(photo(400, 300), 'JPEG', quality=95))
  box = (50, 20, 350, 260)
  image, scaled = picture.image(box, (size, size))
  scale = {100: 2, 60: 4, 30: 8, 20: 8}[size]
  assert image.size == (400 // scale, -(-300 // scale))
  assert scaled == pytest.approx(np.array(box) / scale, rel=0.02)
  found = transforms.resize(picture, size, size, box=box)
  expected = transforms.resize(picture.pixels(), size, size, box=box)
  np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=14)
  assert np.abs(found.astype(int) - expected.astype(int)).mean() < 2


def test_a_crop_that_needs_all_pixels_gets_them():
  picture = data.Picture(encoded(photo(400, 300), 'JPEG'))
  for size in (151, 300):
    image, box = picture.image((0, 0, 400, 300), (size, size))
    assert image.size == (400, 300) and box == (0, 0, 400, 300)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'a.png is no picture that can be read'),
    (b'some text', 'a.png is no picture that can be read'),
    (encoded(photo())[:200], 'a.png can not be read: image file is truncated'),
    (
      encoded(photo(), 'JPEG')[:-200],
      'a.png can not be read: image file is tr',
    ),
    (
      encoded(Image.fromarray(np.zeros((4, 4), np.float32)), 'TIFF'),
      'a.png can not be read: floating-point pixels',
    ),
  ],
  ids=['empty', 'text', 'png', 'jpeg', 'floats'],
)
def test_what_is_no_picture_is_named(content, message):
  picture = data.Picture(content, 'a.png')
  with pytest.raises(data.ImageError, match=message):
    picture.pixels()


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
  content = encoded(Image.new('1', (4000, 3000)))
  assert len(content) < 3000
  picture = data.Picture(content, 'bomb.png')
  assert picture.shape == (3000, 4000, 3)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 8_000_000)
  for limit, number in ((8_000_000, '12,000,000'), (5_000_000, 'too many')):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    with warnings.catch_warnings(), pytest.raises(data.ImageError) as raised:
      warnings.simplefilter('ignore')
      data.Picture(content, 'bomb.png').pixels()
    assert f'bomb.png has {number} pixels; at most' in str(raised.value)


@pytest.mark.parametrize('size', [(1, 1), (1, 4000), (4000, 1), (3, 2)])
def test_a_picture_of_any_shape_comes_to_size(size):
  picture = data.Picture(encoded(photo(*size)))
  found = data.for_evaluation(picture, 16, 0.875)
  assert found.shape == (16, 16, 3)
  rng = np.random.default_rng(0)
  assert transforms.random_resized_crop(picture, rng, 16).shape == (16, 16, 3)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_training_evaluation_and_prediction_see_the_same(
  tmp_path, interpolation
):
  for split in ('train', 'val'):
    (tmp_path / split / 'some').mkdir(parents=True)
    photo(100, 80).save(tmp_path / split / 'some' / 'a.jpg')
  config = config_lib.DataConfig(
    f'imagefolder:{tmp_path}',
    image_size=16,
    batch_size=1,
    crop_ratio=0.875,
    interpolation=interpolation,
    num_threads=0,
    drop_copies=False,
  )
  training = next(data.train_batches(config, seed=0, is_augmented=False))
  evaluation = next(data.eval_batches(config))
  preparation = inference.Preparation(16, 0.875, interpolation)
  predicted = preparation.one(tmp_path / 'val' / 'some' / 'a.jpg')
  np.testing.assert_array_equal(training['images'][0], predicted)
  np.testing.assert_array_equal(evaluation['images'][0], predicted)


def broken(content, rng):
  """Bits flipped, cut short, or a part from elsewhere put in."""
  content = bytearray(content)
  kind = rng.integers(3)
  if kind == 0:
    for _ in range(rng.integers(1, 9)):
      content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  elif kind == 1:
    del content[rng.integers(len(content)) :]
  else:
    start, end = sorted(rng.integers(0, len(content), 2))
    content[start:end] = rng.bytes(rng.integers(0, 40))
  return bytes(content)


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'GIF', 'WEBP'])
def test_a_broken_file_is_a_picture_or_a_named_error(form):
  """2,500 of each, the same ones in each run."""
  rng = np.random.default_rng(7)
  whole = encoded(photo(24, 16), form)
  read = refused = 0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for i in range(2500):
      picture = data.Picture(broken(whole, rng), f'broken {i}')
      try:
        pixels = transforms.resize(picture, 8, 8)
      except decoding.ImageError as error:
        assert str(error).startswith(f'broken {i} ')
        refused += 1
      else:
        assert pixels.shape == (8, 8, 3)
        read += 1
  assert read > 20 and refused > 20
