"""A routed network, or one sub-network, as one file that needs no checkpoint.

The file holds the StableHLO of the whole prediction, from uint8 images to
logits, as `jax.export` writes it (which promises to read it for half a year of
releases at least), the weights, and the router. Its batch is static, as the
tiles of the dispatch are; a last batch is filled up.

Axes: N images, B images a call, R runs, C classes.
"""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.export
import numpy as np
from flax import serialization

from ds_jax import compiler, paths, routing
from ds_jax.inference import batching
from ds_jax.inference import images as images_lib
from ds_jax.inference import predictor as predictors

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
_FORMAT = 'ds_jax routed network 3'


def save(
  predictor: predictors.Predictor,
  path: str | os.PathLike,
  *,
  batch_size: int,
  platform: str | None = None,
  subnet: int | None = None,
) -> None:
  """Writes a predictor, with its router, for one batch size and platform.

  Args:
    predictor: any; `with_budget` chooses the router. With `presliced=False` the
      file is smaller, and the calls are slower.
    path: a file, replaced as a whole.
    batch_size: B, images of a call.
    platform: one of `PLATFORMS`; None means that of this process. What is
      chosen by platform at tracing (tiles, norms within kernels) is as for
      this process: export where the network is to run, if speed counts.
      Attention is XLA's, since cuDNN's is not for every GPU.
    subnet: the index of the sub-network to write instead of the router; it
      needs no trained gate.

  Raises:
    ValueError: for another platform, no positive batch size, a gate that is not
      trained yet, or a sub-network that does not exist.
    ImportError: without flatbuffers.
  """
  _check_flatbuffers()
  platform = platform or compiler.platform()
  if platform not in PLATFORMS or batch_size < 1:
    raise ValueError(
      f'batch_size={batch_size}, platform={platform!r}: expected at least 1,'
      f' and one of {PLATFORMS}.'
    )
  program, arguments, costs = predictor.lowerable(platform, subnet)
  leaves, tree = jax.tree.flatten(arguments)

  def run(leaves, images):
    routed = program(*jax.tree.unflatten(tree, leaves), images)
    return routed.runs, routed.logits

  size = predictor.image_size
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8)
  exported = jax.export.export(jax.jit(run), platforms=[platform])(
    leaves, images
  )
  content = {
    'format': _FORMAT,
    'program': bytes(exported.serialize()),
    'arrays': {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)},
    'platform': platform,
    'batch_size': batch_size,
    'preparation': {
      **dataclasses.asdict(predictor.preparation),
      'background': list(predictor.preparation.background),
    },
    'class_names': list(predictor.class_names or ()),
    'trunk_madds': int(costs.trunk),
    'branch_madds': costs.branches,
    'buckets': np.asarray(costs.indices),
  }
  _write(path, serialization.msgpack_serialize(content))


class Exported:
  """A network that `save` wrote: `exported(images)`.

  Attributes:
    batch_size: B, images of a call on the device.
    preparation: how images are brought to what the network takes.
    class_names: of the labels; None where they are not known.
    costs: multiply-adds of the trunk and of every bucket's branch.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads the file.

    Args:
      path: what `save` wrote.

    Raises:
      ValueError: for another file, or one for another platform.
      ImportError: without flatbuffers.
    """
    _check_flatbuffers()
    content = _read(path)
    platform = compiler.platform()
    if content['platform'] != platform:
      raise ValueError(
        f'{path} is for {content["platform"]}, and this process runs on'
        f' {platform}: export it with platform={platform!r}.'
      )
    self.batch_size = content['batch_size']
    self.preparation = images_lib.Preparation(**content['preparation'])
    self.costs = routing.BucketCosts(
      content['trunk_madds'],
      content['branch_madds'],
      tuple(content['buckets'].tolist()),
    )
    self.class_names = tuple(content['class_names']) or None
    arrays = content['arrays']
    leaves = jax.device_put([arrays[str(i)] for i in range(len(arrays))])
    exported = jax.export.deserialize(bytearray(content['program']))
    options = compiler.options_for_inference()
    call = jax.jit(exported.call, compiler_options=options)
    self._call = functools.partial(call, leaves)

  @property
  def image_size(self) -> int:
    """S, the side of what the network takes, in pixels."""
    return self.preparation.image_size

  def __call__(self, images: np.ndarray) -> predictors.Prediction:
    """Classifies images, B at a time.

    Args:
      images: as for `Predictor`.

    Raises:
      ValueError: for images of another kind.
    """
    items = images_lib.listed(images)
    sizes = [self.batch_size] * -(-len(items) // self.batch_size)
    routed = batching.run(
      items,
      sizes,
      self.preparation.all,
      lambda batch: self._call(jax.device_put(batch)),
    )
    return predictors.prediction_of(
      routing.Routed(*routed), self.costs, self.class_names
    )


def load(path: str | os.PathLike) -> Exported:
  """Reads a network that `save` wrote; see `Exported`."""
  return Exported(path)


def _write(path, data):
  path = os.fspath(paths.expanded(path))
  partial = f'{path}.partial'
  try:
    with open(partial, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError:
    pathlib.Path(partial).unlink(missing_ok=True)
    raise


def _read(path):
  with open(paths.expanded(path), 'rb') as file:
    data = file.read()
  try:
    content = serialization.msgpack_restore(data)
    if content['format'] == _FORMAT:
      return content
  except Exception:
    # msgpack has no error of its own for bytes that are something else.
    pass
  raise ValueError(
    f'{path} is no whole network of this release: write one with python -m'
    ' ds_jax.export.'
  )


def _check_flatbuffers():
  try:
    # Imported here: an option. jax.export writes and reads with it.
    import flatbuffers  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "Exported networks need flatbuffers: pip install -e '.[export]'."
    ) from error
