"""The command: a file of weights to a checkpoint."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flax import serialization

from ds_jax import checkpoint, config, models
from ds_jax.convert import files, formats, importance, statistics


def main(argv: list[str] | None = None) -> None:
  """Converts a file."""
  arguments = _parser().parse_args(argv)
  try:
    _convert(arguments)
  except (ImportError, OSError, ValueError) as error:
    sys.exit(f'{type(error).__name__}: {error}')
  print(f'Wrote {arguments.output}; load it with ds_jax.Predictor.restore.')


def _convert(arguments):
  directory = checkpoint.directory_of(arguments.output)
  if checkpoint.has_steps(directory):
    raise FileExistsError(
      f'{directory} holds checkpoints already; choose a new --output.'
    )
  state = files.read(arguments.input, arguments.state)
  known = formats.recognise(state)
  if arguments.gate == 'trained' and not known.is_sliced:
    raise ValueError(
      f'--gate=trained: these weights are of {known.title}, which has no gate;'
      ' leave out --gate.'
    )
  if arguments.sort and known.is_sliced:
    raise ValueError(
      f'--sort={arguments.sort}: these weights are of {known.title}, whose'
      ' slices are trained as they are; leave out --sort.'
    )
  name = arguments.model or known.default_model(state)
  image_size = arguments.image_size or models.image_size(name)
  model_arguments = {
    'name': name,
    'num_classes': arguments.num_classes or known.num_classes(state),
    **models.size_options(name, image_size),
    **known.model_options(state),
  }
  model = known.load(state, models.create_model(**model_arguments))
  if arguments.sort:
    model = importance.sort_channels(model, arguments.sort)
  mean, std = (
    statistics.channel_statistics(arguments.input, known) or statistics.IMAGENET
  )
  _save(
    model,
    model_arguments,
    arguments.output,
    phase='converted' if known.is_sliced else 'pretrained',
    has_gate=arguments.gate == 'trained',
    image_size=image_size,
    interpolation=arguments.interpolation or known.interpolation,
    mean=arguments.mean or mean,
    std=arguments.std or std,
  )


def _save(
  model,
  model_arguments: Mapping[str, Any],
  output: str,
  *,
  phase: str,
  has_gate: bool,
  image_size: int,
  interpolation: str,
  mean: Sequence[float],
  std: Sequence[float],
) -> None:
  """Writes a checkpoint that `Predictor.restore(output)` loads."""
  meta = {
    'phase': phase,
    'has_gate': has_gate,
    'model': dict(model_arguments),
    'image_size': image_size,
    'crop_ratio': 0.875,
    'interpolation': interpolation,
    'mean': mean,
    'std': std,
  }
  network = serialization.to_state_dict(models.variables_of(model))
  with checkpoint.Checkpointer(checkpoint.directory_of(output)) as saver:
    saver.save(0, {'network': network}, meta)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m ds_jax.convert',
    description='Makes a checkpoint of a file of weights, those of '
    + ', '.join(known.title for known in formats.FORMATS)
    + '; the format is told by the names in the file.',
  )
  parser.add_argument(
    '--input', required=True, help='an .npz, .safetensors or PyTorch file'
  )
  parser.add_argument('--output', required=True, help='the workdir to write')
  parser.add_argument(
    '--state',
    metavar='KEY',
    help='which of the states in a PyTorch file, as in model_ema, or the prefix'
    ' of one of the networks in a state; default: the moving average where'
    ' there is one',
  )
  parser.add_argument(
    '--gate',
    choices=('trained', 'untrained'),
    default='untrained',
    help="whether the gate in the authors' weights is trained, and routes; in"
    ' their release it is not',
  )
  parser.add_argument(
    '--model',
    choices=models.list_models(),
    help='default: ds_mobilenet, ds_resnet50, or for a ViT of 384 or 192'
    ' channels ds_vit_s16 or ds_vit_ti16',
  )
  parser.add_argument(
    '--num_classes',
    type=int,
    help="default: the file's; any other starts with a fresh classifier",
  )
  parser.add_argument(
    '--image_size', type=int, help="in pixels; default: the model's"
  )
  parser.add_argument(
    '--sort',
    choices=config.IMPORTANCES,
    help='order the channels by their importance, so that narrow networks keep'
    ' the best; default: as they are',
  )
  parser.add_argument(
    '--interpolation',
    choices=config.INTERPOLATIONS,
    help="how images of another size are resized; default: as the weights'"
    ' authors evaluate, bicubic for DS-Net and timm, else bilinear',
  )
  for option in ('mean', 'std'):
    parser.add_argument(
      f'--{option}',
      type=_channels,
      help=f'the {option} that the weights were trained with, of pixel / 255:'
      ' one number or three, as in 0.5 or 0.48,0.46,0.41; default: what the'
      " JSON file beside the weights says (timm's and Hugging Face's have one),"
      " else ImageNet's, right for DS-Net, torchvision and DeiT. Many ViTs of"
      ' timm and Hugging Face need 0.5.',
    )
  return parser


def _channels(text: str) -> tuple[float, ...]:
  try:
    values = tuple(float(value) for value in text.split(','))
  except ValueError:
    values = ()
  if len(values) not in (1, 3):
    raise argparse.ArgumentTypeError(
      f'{text!r}: expected one number or three, as in 0.48,0.46,0.41.'
    )
  return values if len(values) == 3 else values * 3
