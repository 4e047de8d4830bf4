"""Weights from elsewhere, as ds_jax models and checkpoints.

    python -m ds_jax.convert --input=DS_MBNet-70_1.pth.tar --output=DIR

writes a checkpoint that `Predictor.restore("DIR")` loads. The file is read with
PyTorch (`pip install -e ".[torch]"`), and by nothing but its
`weights_only=True` reader.
"""

import argparse
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization

from ds_jax import checkpoint, data, models

# A damaged file raises RuntimeError or UnpicklingError.
_PLAIN_ERRORS = (
  ImportError,
  OSError,
  RuntimeError,
  ValueError,
  pickle.UnpicklingError,
)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where one of our arrays comes from.

  Attributes:
    names: the PyTorch arrays, one a row for statistics.
    shapes: the shape each must have.
    assemble: makes our array of theirs.
  """

  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  assemble: Callable[[list[np.ndarray]], np.ndarray]


def from_official(state: Mapping[str, Any], model: nnx.Module) -> nnx.Module:
  """Loads the authors' DS-Net weights into a `MobileNet`.

  Args:
    state: PyTorch names to arrays (NumPy or torch), as in the release; a
      `module.` prefix and `num_batches_tracked` are ignored.
    model: a `MobileNet` of the same widths, for example
      `create_model('ds_mobilenet')`; it is not changed.

  Returns:
    A model with these weights and statistics.

  Raises:
    ValueError: that lists every missing, unknown and misshapen name.
  """
  state = {
    name.removeprefix('module.'): value
    for name, value in state.items()
    if not name.endswith('num_batches_tracked')
  }
  sources = _official_sources(model)
  _check_names(state, sources)
  arrays = {
    path: jnp.asarray(s.assemble([_to_numpy(state[n]) for n in s.names]))
    for path, s in sources.items()
  }
  old = models.variables_of(model)
  return models.Architecture(model).bind(
    models.Variables(
      {path: arrays[path] for path in old.params},
      {path: arrays[path] for path in old.batch_stats},
    )
  )


def _official_sources(model) -> dict[str, _Source]:
  variables = models.variables_of(model)
  sources = {}
  for path, array in variables.params.items():
    module, leaf = path.rsplit('/', 1)
    if module.endswith('norm'):
      widths = _norm_widths(model, module)
      name = f'{_official_module(module)}.aux_bn.{len(widths) - 1}'
      kind = 'weight' if leaf == 'scale' else 'bias'
      sources[path] = _Source((f'{name}.{kind}',), (array.shape,), _only)
    else:
      sources[path] = _weight_source(module, leaf, array.shape)
  for path, array in variables.batch_stats.items():
    module, leaf = path.rsplit('/', 1)
    sources[path] = _statistics_source(
      _official_module(module),
      'running_mean' if leaf == 'mean' else 'running_var',
      _norm_widths(model, module),
      array.shape,
    )
  return sources


def _weight_source(module, leaf, shape) -> _Source:
  name = _official_module(module)
  if leaf == 'bias':
    return _Source((f'{name}.bias',), (shape,), _only)
  if len(shape) == 4:
    theirs = (shape[3], shape[2], shape[0], shape[1])
    return _Source(
      (f'{name}.weight',), (theirs,), lambda w: w[0].transpose(2, 3, 1, 0)
    )
  # Their dense layers inside the blocks are 1 x 1 convolutions.
  theirs = shape[::-1] if module == 'classifier' else (*shape[::-1], 1, 1)
  return _Source(
    (f'{name}.weight',), (theirs,), lambda w: w[0].reshape(w[0].shape[:2]).T
  )


def _statistics_source(name, kind, widths, shape) -> _Source:
  """One row a slice; a further row, the widest network's, repeats the last."""
  slices = [min(row, len(widths) - 1) for row in range(shape[0])]
  fill = 0.0 if kind == 'running_mean' else 1.0

  def assemble(rows):
    full = np.full(shape, fill, np.float32)
    for row, values in enumerate(rows):
      full[row, : len(values)] = values
    return full

  return _Source(
    tuple(f'{name}.aux_bn.{i}.{kind}' for i in slices),
    tuple((widths[i],) for i in slices),
    assemble,
  )


def _norm_widths(model, module: str) -> tuple[int, ...]:
  """The slice list of a norm's input, which is also how theirs are counted."""
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(\w+)', module)
  if not match:
    return model.specs[0].widths
  stage, block, norm = int(match[1]), int(match[2]), match[3]
  first_depthwise = norm == 'depthwise_norm' and block == 0
  # `specs` starts with the stem, so a stage's input is at its own index.
  return model.specs[stage if first_depthwise else stage + 1].widths


_OFFICIAL_LAYERS = {
  'depthwise': 'conv_dw',
  'depthwise_norm': 'bn1',
  'gate/reduce': 'gate.conv_reduce',
  'gate/expand': 'gate.conv_expand',
  'gate/slim': 'gate.gate.0',
  'pointwise': 'conv_pw',
  'pointwise_norm': 'bn2',
}


def _official_module(module: str) -> str:
  outside = {'stem': 'conv_stem', 'stem_norm': 'bn1'}
  match = re.fullmatch(r'stages/(\d+)/(\d+)/(.+)', module)
  if not match:
    return outside.get(module, module)
  stage, block, layer = match[1], int(match[2]), match[3]
  place = f'residual_blocks.{block - 1}' if block else 'first_block'
  return f'blocks.{stage}.{place}.{_OFFICIAL_LAYERS[layer]}'


def _check_names(state, sources):
  wanted = {
    name: shape
    for source in sources.values()
    for name, shape in zip(source.names, source.shapes, strict=True)
  }
  problems = [f'missing: {n} {wanted[n]}' for n in wanted if n not in state]
  problems += [f'unknown: {n}' for n in state if n not in wanted]
  problems += [
    f'shape of {n}: {tuple(state[n].shape)}, expected {wanted[n]}'
    for n in wanted
    if n in state and tuple(state[n].shape) != wanted[n]
  ]
  if problems:
    raise ValueError(
      'These weights do not fit the model (are its widths and num_classes'
      ' those of the checkpoint?):\n  ' + '\n  '.join(problems)
    )


def _to_numpy(array) -> np.ndarray:
  if hasattr(array, 'detach'):
    array = array.detach().cpu().numpy()
  return np.asarray(array, np.float32)


def _only(arrays):
  return arrays[0]


def read_torch(path: str) -> dict[str, Any]:
  """Reads the state of a PyTorch checkpoint, arrays only.

  Args:
    path: a file of `torch.save`: the state itself, or a dict that holds it as
      `state_dict_ema` (preferred), `state_dict` or `model`.

  Raises:
    ImportError: if PyTorch is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if it holds something else.
  """
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'Reading {path} needs PyTorch: pip install -e ".[torch]".'
    ) from error
  # Training scripts put their arguments beside the arrays.
  with torch.serialization.safe_globals([argparse.Namespace]):
    content = torch.load(path, map_location='cpu', weights_only=True)
  if not isinstance(content, Mapping):
    raise ValueError(f'{path} holds a {type(content).__name__}, not a dict.')
  for name in ('state_dict_ema', 'state_dict', 'model'):
    if isinstance(content.get(name), Mapping):
      return dict(content[name])
  return dict(content)


def save_converted(model, model_arguments: Mapping[str, Any], output: str):
  """Writes a checkpoint that `Predictor.restore(output)` loads.

  Args:
    model: the converted network.
    model_arguments: what `create_model` made it of.
    output: the workdir to write, new or empty.

  Raises:
    FileExistsError: if there are checkpoints already.
  """
  directory = checkpoint.directory_of(output)
  if checkpoint.has_steps(directory):
    raise FileExistsError(
      f'{directory} holds checkpoints already; choose a new --output.'
    )
  mean, std = data.channel_statistics('imagenet2012')
  meta = {
    'stage': 'converted',
    'model': dict(model_arguments),
    'image_size': 224,
    'crop_ratio': 0.875,
    'mean': mean,
    'std': std,
  }
  network = serialization.to_state_dict(models.variables_of(model))
  with checkpoint.Checkpointer(directory) as saver:
    saver.save(0, {'network': network}, meta)


def main(argv: list[str] | None = None) -> None:
  """Converts a file."""
  parser = argparse.ArgumentParser(
    prog='python -m ds_jax.convert', description=__doc__.splitlines()[0]
  )
  parser.add_argument('--input', required=True, help='a .pth or .pth.tar file')
  parser.add_argument('--output', required=True, help='the workdir to write')
  arguments = parser.parse_args(argv)
  model_arguments = {'name': 'ds_mobilenet', 'num_classes': 1000}
  try:
    state = read_torch(arguments.input)
    model = models.create_abstract_model(**model_arguments)
    save_converted(
      from_official(state, model), model_arguments, arguments.output
    )
  except _PLAIN_ERRORS as error:
    sys.exit(f'{type(error).__name__}: {error}')
  print(f'Wrote {arguments.output}; load it with ds_jax.Predictor.restore.')


if __name__ == '__main__':
  main()
