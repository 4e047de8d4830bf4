"""An exported network says what its predictor says, in a process of its own."""

import builtins
import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import routed
from ds_jax import export, inference, models, routing
from ds_jax.inference import export as files
from ds_jax.inference import parts


@pytest.fixture(scope='module')
def images():
  return routed.make_images(40)


@pytest.fixture(scope='module')
def model(images):
  return routed.make_model(images)


def make_predictor(model, images, **options):
  """With outcomes to set budgets on."""
  predictor = inference.Predictor(
    model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3
  )
  logits = [
    predictor(images, subnet=k).logits for k in range(len(model.routing_space))
  ]
  gate_logits = model.gate_logits(model.trunk(routed.as_floats(images)))
  labels = logits[-1].argmax(-1)
  return inference.Predictor(
    model,
    image_size=8,
    mean=(0.4,) * 3,
    std=(0.2,) * 3,
    held_out=routing.observe(
      np.asarray(gate_logits), np.stack(logits, axis=1), labels
    ),
    **options,
  )


@pytest.fixture(scope='module')
def predictor(model, images):
  return make_predictor(model, images)


def assert_same(found, expected):
  for field in dataclasses.fields(expected):
    one, other = (getattr(p, field.name) for p in (found, expected))
    if field.name == 'class_names':
      assert one == other
      continue
    assert one.dtype == other.dtype
    if field.name == 'logits':
      # A batch of another size adds up in another order.
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(one, other)


def budgeted(predictor, router):
  if router == 'gate':
    return predictor
  if router == 'fixed':
    other = predictor.with_budget(fraction=0.8)
    other.router = routing.cascade_router(3, (1,), ())
    return other
  return predictor.with_budget(fraction=0.8, router=router, score='learned')


@pytest.mark.parametrize('router', ['gate', 'cascade', 'fixed'])
@pytest.mark.parametrize('batch_size', [1, 16])
def test_it_says_what_the_predictor_says(
  predictor, images, tmp_path, router, batch_size
):
  chosen = budgeted(predictor, router)
  expected = chosen(images)
  # Otherwise the test would show little.
  assert (len(set(expected.buckets.tolist())) > 1) == (router != 'fixed')
  path = tmp_path / 'network'
  export.save(chosen, path, batch_size=batch_size)
  found = export.load(path)
  assert found.batch_size == batch_size and found.image_size == 8
  # 40 images are two and a half batches of 16.
  assert_same(found(images), expected)
  assert_same(found(images[:3]), chosen(images[:3]))


def test_images_of_another_size_are_resized_alike(predictor, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 11, 9, 1))
  images = images.astype(np.uint8)
  export.save(predictor, tmp_path / 'network', batch_size=4)
  found = export.load(tmp_path / 'network')
  assert_same(found(images), predictor(images))
  with pytest.raises(ValueError, match='add the batch axis'):
    found(images[0])


def test_shared_weights_are_stored_once(model, images, predictor, tmp_path):
  shared = make_predictor(model, images, presliced=False)
  export.save(shared, tmp_path / 'network', batch_size=4)
  assert_same(export.load(tmp_path / 'network')(images), predictor(images))
  arrays = files._read(tmp_path / 'network')['arrays'].values()
  stored = jax.tree.leaves((models.variables_of(model), shared.router))
  assert sorted(a.shape for a in arrays) == sorted(a.shape for a in stored)


def test_a_fresh_process_needs_the_file_alone(predictor, images, tmp_path):
  export.save(predictor, tmp_path / 'network', batch_size=8)
  np.save(tmp_path / 'images.npy', images)
  program = f"""
import sys
import numpy as np
import ds_jax
network = ds_jax.export.load({str(tmp_path / 'network')!r})
np.save({str(tmp_path / 'labels.npy')!r},
        network(np.load({str(tmp_path / 'images.npy')!r})).labels)
"""
  subprocess.run([sys.executable, '-c', program], check=True)
  np.testing.assert_array_equal(
    np.load(tmp_path / 'labels.npy'), predictor(images).labels
  )


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_other_platforms_run_a_batch_at_once(
  predictor, tmp_path, monkeypatch, platform
):
  path = tmp_path / 'network'

  def exported():
    export.save(predictor, path, batch_size=4, platform=platform)
    program = jax.export.deserialize(bytearray(files._read(path)['program']))
    assert program.platforms == (platform,)
    return program.mlir_module()

  whole = exported().count('stablehlo.while')
  # Chunks of two images of 8 pixels, for a CPU.
  monkeypatch.setattr(parts, '_CPU_PIXELS', 2 * 64)
  text = exported()
  # A loop over chunks in the trunk and in each of the three branches.
  more = text.count('stablehlo.while') - whole
  assert more == (4 if platform == 'cpu' else 0)
  groups = re.findall(r'feature_group_count = (\d+)', text)
  # The form of the depthwise convolution that only XLA:CPU does not want.
  assert ({'1'} >= set(groups)) == (platform == 'cpu')
  if platform != 'cpu':
    with pytest.raises(ValueError, match=f"is for {platform}.*platform='cpu'"):
      export.load(path)


def test_a_damaged_file_is_named(predictor, tmp_path):
  path = tmp_path / 'network'
  export.save(predictor, path, batch_size=1)
  whole = path.read_bytes()
  for damaged in (whole[:1000], b'', b'PK'):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='is no whole network'):
      export.load(path)


def test_what_cannot_be_exported_is_refused(model, predictor, tmp_path):
  path = tmp_path / 'network'
  with pytest.raises(ValueError, match='batch_size=0'):
    export.save(predictor, path, batch_size=0)
  with pytest.raises(ValueError, match="platform='abacus'"):
    export.save(predictor, path, batch_size=1, platform='abacus')
  untrained = inference.Predictor(
    model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3, has_gate=False
  )
  with pytest.raises(ValueError, match='its gate is not trained'):
    export.save(untrained, path, batch_size=1)
  assert not list(tmp_path.iterdir())


def test_flatbuffers_is_asked_for(predictor, tmp_path, monkeypatch):
  real = builtins.__import__

  def fail(name, *args, **kwargs):
    if name == 'flatbuffers':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', fail)
  with pytest.raises(ImportError, match=r"pip install -e '.\[export\]'"):
    export.save(predictor, tmp_path / 'network', batch_size=1)


def test_a_write_that_fails_leaves_nothing(predictor, tmp_path, monkeypatch):
  def fail(_):
    raise OSError('no space left')

  monkeypatch.setattr(export.os, 'fsync', fail)
  with pytest.raises(OSError, match='no space left'):
    export.save(predictor, tmp_path / 'network', batch_size=1)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'CheckpointError: .*nowhere'),
    (['--router=cascade'], '2'),  # of argparse, before anything is read
  ],
)
def test_the_command_ends_with_one_line(tmp_path, arguments, message):
  nowhere = ['--workdir', str(tmp_path / 'nowhere'), '--output', 'unused']
  with pytest.raises(SystemExit, match=message):
    export.main([*nowhere, *arguments])
