"""The benchmark as a command: runs the sections and writes what they found."""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from absl import logging

from ds_jax import checkpoint, cpu, inference, models, paths
from ds_jax import config as config_lib
from ds_jax.benchmark import (
  forward,
  onnxruntime,
  output,
  pipeline,
  routers,
  start_up,
  timing,
  training,
)

SECTIONS = (
  'sub-networks',
  'dispatch',
  'memory',
  'training',
  'input pipeline',
  'start-up',
  'routers',
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure.

  Attributes:
    model: a name of `ds_jax.list_models()`, with random weights; or
    workdir: a run, to its end.
    num_classes: of a model by name.
    image_size: of a model by name, in pixels; None means the model's own.
    dtype: of a model by name, `float32` or `bfloat16`.
    batch_sizes: of inference.
    buckets: whose sub-networks are timed; None means every one.
    train_batch_size: of training steps.
    sections: some of `SECTIONS`.
    seconds: for which each section and batch size is timed.
    num_images: test images that a run's routers are timed on.
    compare: None, or `onnxruntime`.
    json: a file to write, too; the plot lies beside it.
  """

  model: str | None = None
  workdir: str | None = None
  num_classes: int = 1000
  image_size: int | None = None
  dtype: str = 'float32'
  batch_sizes: Sequence[int] = (1, 8, 64)
  buckets: Sequence[int] | None = None
  train_batch_size: int = 16
  sections: Sequence[str] = SECTIONS
  seconds: float = 20.0
  num_images: int = 256
  compare: str | None = None
  json: str | None = None


def run(options: Options) -> dict[str, Any]:
  """Measures, prints the table, writes the file, and returns what is in it."""
  config, image_size = _what(options)
  if options.workdir:
    predictor = inference.Predictor.restore(options.workdir)
    model = predictor.model
  else:
    predictor, model = None, _without_zeros(models.create_model(**config))
  subject = forward.Subject(model, image_size, options.buckets)
  report = _Report(options, _about(options, subject))
  (matmul,) = report.measure(training.matmul_ways(model.dtype))
  rate = matmul.madds_per_second
  if 'sub-networks' in options.sections:
    _measure_sub_networks(report, subject, rate)
  if 'dispatch' in options.sections:
    _measure_dispatch(report, subject)
  if 'memory' in options.sections:
    used = forward.memory(subject, max(options.batch_sizes))
    report.lists['memory_bytes'] = used
    report.ratios['routed_over_widest_memory'] = (
      used['routed'] / used['largest bucket']
    )
  if 'training' in options.sections:
    _measure_training(report, subject)
  if 'input pipeline' in options.sections:
    _measure_pipeline(report, image_size)
  if 'start-up' in options.sections:
    seconds = start_up.measure(config, image_size)
    report.lists['start_up_seconds'] = seconds
    report.ratios['warm_over_cold_start'] = seconds['warm'] / seconds['cold']
  if 'routers' in options.sections and predictor:
    images = routers.test_images(options.workdir, options.num_images)
    for batch_size in options.batch_sizes:
      report.measure(routers.router_ways(predictor, images, batch_size))
  if options.compare == 'onnxruntime':
    _compare(report, subject)
  report.end(rate)
  return report.results


class _Report:
  """What is measured, and where it goes.

  Attributes:
    ratios: by name.
    lists: what the ratios are made of, and other figures.
    rows: what was timed.
  """

  def __init__(self, options: Options, about: dict[str, Any]):
    self.options = options
    self.ratios, self.lists = {}, {}
    self.rows: list[timing.Row] = []
    self._about = about

  @property
  def results(self) -> dict[str, Any]:
    """What the file holds, beside the rows."""
    return {'ratios': self.ratios, 'lists': self.lists}

  def measure(self, ways: Sequence[timing.Way]) -> list[timing.Row]:
    """Times ways in turn."""
    if not ways:
      return []
    logging.info('%s, batch %d ...', ways[0].section, ways[0].batch_size)
    new = timing.time_in_turn(ways, self.options.seconds)
    self.rows.extend(new)
    # Each time, so that a run that is cut short leaves something.
    self._write()
    return new

  def end(self, matmul_rate: float) -> None:
    """Prints and writes everything."""
    print(', '.join(f'{name} {value}' for name, value in self._about.items()))
    print(output.table(self.rows, matmul_rate))
    print()
    print(json.dumps(self.results, indent=2))
    path = self._write()
    if path:
      try:
        output.plot(self.rows, path.with_suffix('.png'))
      except ImportError:
        logging.info("No plot without matplotlib: pip install -e '.[plot]'.")

  def _write(self) -> pathlib.Path | None:
    if not self.options.json:
      return None
    path = pathlib.Path(paths.expanded(self.options.json))
    output.write(path, self._about, self.rows, self.results)
    return path


def _measure_sub_networks(report, subject, matmul_rate):
  rows = []
  for batch_size in report.options.batch_sizes:
    rows += report.measure(forward.subnet_ways(subject, [batch_size]))
  found, report.lists['sub-networks'] = forward.subnet_ratios(
    subject, rows, matmul_rate
  )
  report.ratios.update(found)


def _measure_dispatch(report, subject):
  largest = max(report.options.batch_sizes)
  *ways, vmapped = forward.dispatch_ways(subject, largest)
  # On its own, since it takes so much memory that it slows down the others.
  rows = report.measure(ways) + report.measure([vmapped])
  report.ratios.update(forward.dispatch_ratios(rows))
  depthwise = report.measure(forward.depthwise_ways(subject))
  if depthwise and jax.default_backend() == 'cpu':
    report.ratios.update(forward.depthwise_ratios(depthwise))


def _measure_training(report, subject):
  options, size = report.options, subject.image_size
  ahead, gradient, *steps = training.training_ways(
    subject.model, size, options.train_batch_size
  )
  # Without the steps, which leave their memory all over the caches.
  rows = report.measure([ahead, gradient])
  report.measure(steps)
  report.ratios.update(training.training_ratios(rows))


def _measure_pipeline(report, image_size):
  report.measure(pipeline.run_ways(_dataset(report.options, image_size)))
  with pipeline.jpeg_ways() as ways:
    rows = report.measure(ways)
  report.ratios['pipeline_over_pillow'] = pipeline.jpeg_ratios(rows)


def _compare(report, subject):
  rows, found = onnxruntime.compare(
    subject,
    forward.spread_out(subject.own.costs.indices, 3),
    report.options.batch_sizes,
    report.options.seconds / 10,
  )
  report.rows.extend(rows)
  report.ratios['onnxruntime_over_ours'] = found['direct']
  report.lists['onnxruntime_over_ours'] = found


def _what(options) -> tuple[dict[str, Any], int]:
  """Returns the arguments of `create_model`, and the images' size."""
  if options.workdir:
    meta = checkpoint.restore(checkpoint.directory_of(options.workdir)).meta
    return meta['model'], meta['image_size']
  size = options.image_size or models.image_size(options.model)
  sized = models.size_options(options.model, size)
  return {
    'name': options.model,
    'num_classes': options.num_classes,
    'dtype': options.dtype,
    **sized,
  }, size


def _without_zeros(model):
  """Stirs fresh weights, of which some are zero.

  A GPU draws less power on zeros, and is faster.
  """
  variables = models.variables_of(model)
  rng = np.random.default_rng(0)
  params = {
    path: x + rng.normal(0, 0.02, x.shape).astype(x.dtype)
    for path, x in variables.params.items()
  }
  return models.Architecture(model).bind(variables.replace(params=params))


def _dataset(options, image_size):
  if options.workdir:
    return routers.dataset_of(options.workdir)
  # The one that is always there, resized.
  return config_lib.DataConfig(
    name='digits', image_size=image_size, batch_size=64
  )


def _about(options, subject):
  device = jax.devices()[0]
  return {
    'model': options.model or options.workdir,
    'image_size': subject.image_size,
    'dtype': subject.model.dtype,
    'device': f'{device.platform}: {device.device_kind}',
    'cores': len(os.sched_getaffinity(0)),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'python': platform.python_version(),
  }


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and runs."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  cpu.keep_freed_memory()
  defaults = Options()
  parser = argparse.ArgumentParser(prog='python -m ds_jax.benchmark')
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--model', choices=models.list_models())
  what.add_argument('--workdir', help='a run of ds_jax.main, to its end')
  parser.add_argument('--num_classes', type=int, default=1000)
  parser.add_argument('--image_size', type=int, help='pixels a side')
  parser.add_argument(
    '--dtype', choices=['float32', 'bfloat16'], default=defaults.dtype
  )
  parser.add_argument(
    '--batch_sizes', type=_numbers, default=defaults.batch_sizes
  )
  parser.add_argument('--buckets', type=_numbers, help='0,3: not every one')
  parser.add_argument('--train_batch_size', type=int, default=16)
  parser.add_argument('--sections', type=_sections, default=SECTIONS)
  parser.add_argument(
    '--seconds', type=float, default=defaults.seconds, help='for each section'
  )
  parser.add_argument('--num_images', type=int, default=defaults.num_images)
  parser.add_argument('--compare', choices=['onnxruntime'])
  parser.add_argument('--json', help='also writes a file, and a plot beside it')
  run(Options(**vars(parser.parse_args(argv))))


def _numbers(text):
  return tuple(int(number) for number in text.split(','))


def _sections(text):
  chosen = tuple(text.split(','))
  unknown = sorted(set(chosen) - set(SECTIONS))
  if unknown:
    raise argparse.ArgumentTypeError(
      f'{unknown[0]!r} is not one of {", ".join(SECTIONS)}'
    )
  return chosen
