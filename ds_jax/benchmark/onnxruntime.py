"""Times the same sub-networks in ONNX Runtime, in a process of its own.

Two frameworks in one process disturb each other: their threads spin while they
wait. So a child process has ONNX Runtime, and the two take turns.

A graph is exported in two forms. `direct` is what jax2onnx makes of the
function. In `convolutions` the dense layers on images are 1 x 1 convolutions,
which ONNX Runtime keeps in its own blocked layout, fused with what follows;
XLA:CPU has nothing like it.
"""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import models
from ds_jax.benchmark import forward, timing
from ds_jax.nn import conv, dense, gate

FORMS = ('direct', 'convolutions')
_ROUNDS = 3


def compare(
  subject: forward.Subject,
  buckets: Sequence[int],
  batch_sizes: Sequence[int],
  seconds: float,
) -> tuple[list[timing.Row], dict[str, float]]:
  """Times buckets in both frameworks, in turn.

  Returns:
    Rows, and by form and `bucket/batch` ONNX Runtime's time over ours.

  Raises:
    ImportError: without the extra `onnx`.
  """
  rows, ratios = [], {form: {} for form in FORMS}
  with tempfile.TemporaryDirectory() as folder:
    for batch_size in batch_sizes:
      for bucket in buckets:
        program = subject.own.program(bucket)
        way = timing.Way(
          'ONNX Runtime',
          f'bucket {bucket}, ds_jax',
          batch_size,
          subject.madds(bucket),
          functools.partial(program, subject.images(batch_size)),
        )
        paths = [
          _export(subject, bucket, batch_size, form, pathlib.Path(folder))
          for form in FORMS
        ]
        ours, theirs = [], [[] for _ in FORMS]
        for _ in range(_ROUNDS):
          ours += timing.time_in_turn([way], seconds)
          for path, taken in zip(paths, theirs, strict=True):
            taken += _run(path, subject.images(batch_size), seconds)
        row = _join(ours)
        rows.append(row)
        for form, taken in zip(FORMS, theirs, strict=True):
          other = timing.Row(
            'ONNX Runtime', f'bucket {bucket}, {form}', batch_size,
            row.madds, None, 1, 0.0, taken,
          )  # fmt: skip
          rows.append(other)
          ratios[form][f'{bucket}/{batch_size}'] = other.median / row.median
  return rows, ratios


def _join(rows):
  first, *_ = rows
  return timing.Row(
    first.section, first.name, first.batch_size, first.madds, None, 1,
    first.first_call, [s for row in rows for s in row.seconds],
  )  # fmt: skip


def _export(subject, bucket, batch_size, form, folder) -> pathlib.Path:
  """Writes one fixed sub-network, from uint8 images to logits."""
  try:
    # Imported here: an option.
    import jax2onnx
  except ImportError as error:
    raise ImportError(
      'Comparing with ONNX Runtime needs "pip install -e \'.[onnx]\'" and "pip'
      ' install --no-deps jax2onnx"; the latter by itself, since jax2onnx asks'
      ' for an older Orbax, which it does not use here.'
    ) from error

  model = subject.model
  architecture = models.Architecture(model)
  variables = models.variables_of(model)

  def run(images):
    images = (images.astype(jnp.float32) / 255 - 0.5) / 0.25
    bound = architecture.bind(variables)
    return bound(images, model.sub_networks[bucket])

  path = folder / f'{form}_{bucket}_{batch_size}.onnx'
  size = subject.image_size
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
  matmul = _as_convolution if form == 'convolutions' else jnp.matmul
  # The forms that only XLA needs.
  with (
    mock.patch.object(conv, 'depthwise_conv', conv.native_depthwise_conv),
    mock.patch.object(conv, 'few_channels_conv', conv.native_conv),
    mock.patch.object(gate, 'mean_of_pixels', lambda x: x.mean((1, 2))),
    mock.patch.object(dense, 'matmul', matmul),
  ):
    jax2onnx.to_onnx(run, [images], return_mode='file', output_path=str(path))
  return path


def _as_convolution(x, kernel):
  if x.ndim != 4:
    return x @ kernel
  return jax.lax.conv_general_dilated(
    x,
    kernel[None, None],
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _run(path, images, seconds) -> list[float]:
  """Returns the seconds of each call, in a process of its own."""
  inputs = path.with_suffix('.npy')
  np.save(inputs, np.asarray(images))
  done = subprocess.run(
    [sys.executable, '-c', _CHILD, str(path), str(inputs), str(seconds)],
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(done.stdout)


# Imports nothing of JAX.
_CHILD = """
import json, os, sys, time
import numpy as np
import onnxruntime
path, inputs, seconds = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))
session = onnxruntime.InferenceSession(path, options)
feed = {session.get_inputs()[0].name: np.load(inputs)}
for _ in range(3):
  session.run(None, feed)
taken, end = [], time.perf_counter() + float(seconds)
while len(taken) < 3 or time.perf_counter() < end and len(taken) < 100:
  start = time.perf_counter()
  session.run(None, feed)
  taken.append(time.perf_counter() - start)
print(json.dumps(taken))
"""
