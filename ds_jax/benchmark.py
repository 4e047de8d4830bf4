"""What routing saves in time, beside what it saves in multiply-adds.

    python -m ds_jax.benchmark --workdir=runs/fashion --batch_sizes=1,64

Times a trained run on its own test images: every bucket for all images, and the
routers at some budgets. All are timed in turn, again and again, and the medians
compared: on a shared machine a ratio within one run means something, a time
does not.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ds_jax import checkpoint, data, predict, routing

# Shares of the dearest bucket's MAdds.
_BUDGETS = (0.4, 0.6, 0.8)
_ROUTERS = ('gate', 'cascade')


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to classify the images.

  Attributes:
    name: of the way.
    batch_size: images in a call.
    milliseconds: for an image, the median over the repeats.
    spread: half the distance between the quartiles, as a share of the median.
    madds: for an image, on average.
    speed_up: over the dearest bucket, in time.
    madds_reduction: over the dearest bucket, in multiply-adds.
    realised: speed_up / madds_reduction.
  """

  name: str
  batch_size: int
  milliseconds: float
  spread: float
  madds: float
  speed_up: float
  madds_reduction: float
  realised: float


def time_in_turn(
  ways: Sequence[Callable[[], object]], repeats: int
) -> list[list[float]]:
  """Returns, for each way, the seconds that each of its repeats took.

  Every way has run once before, so nothing is compiled here.
  """
  for way in ways:
    jax.block_until_ready(way())
  seconds = [[] for _ in ways]
  for _ in range(repeats):
    for way, taken in zip(ways, seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(way())
      taken.append(time.perf_counter() - start)
  return seconds


def measure(
  predictor: predict.Predictor,
  images: np.ndarray,
  batch_size: int,
  repeats: int,
) -> list[Row]:
  """Times buckets and routers on the same images.

  Args:
    predictor: of a run with held-out images, to set budgets on.
    images: (N, S, S, 3) uint8, of the predictor's size.
    batch_size: images in a call; whole batches are timed.
    repeats: how often everything is timed.
  """
  num_batches = max(len(images) // batch_size, 1)
  images = images[: num_batches * batch_size]
  batches = [jax.device_put(b) for b in np.split(images, num_batches)]
  num_buckets = predictor.router.num_buckets
  ways, names, madds = [], [], []
  for bucket in range(num_buckets):
    ways.append(predictor.program(subnet=bucket))
    names.append(f'bucket {bucket}')
    madds.append(predictor(images[:1], subnet=bucket).madds.mean())
  for router in _ROUTERS:
    for budget in _BUDGETS:
      try:
        routed = predictor.with_budget(fraction=budget, router=router)
      except routing.BudgetError:  # Below the narrowest bucket's cost.
        continue
      ways.append(routed.program())
      names.append(f'{router} at {budget:.0%}')
      spent = [routed(np.asarray(batch)).madds for batch in batches]
      madds.append(np.concatenate(spent).mean())
  seconds = time_in_turn(
    [lambda way=way: [way(batch) for batch in batches] for way in ways], repeats
  )
  medians = [statistics.median(taken) for taken in seconds]
  dearest = num_buckets - 1
  return [
    Row(
      name=name,
      batch_size=batch_size,
      milliseconds=1e3 * median / len(images),
      spread=float(np.subtract(*np.percentile(taken, (75, 25))) / 2 / median),
      madds=float(spent),
      speed_up=medians[dearest] / median,
      madds_reduction=float(madds[dearest] / spent),
      realised=float(medians[dearest] / median / (madds[dearest] / spent)),
    )
    for name, median, taken, spent in zip(
      names, medians, seconds, madds, strict=True
    )
  ]


def table(rows: Sequence[Row]) -> str:
  """Returns the rows as text for people."""
  lines = [
    f'{"":>16} {"batch":>5} {"ms/image":>9} {"spread":>7} {"MAdds":>13}'
    f' {"speed-up":>8} {"reduction":>9} {"realised":>8}'
  ]
  lines += [
    f'{row.name:>16} {row.batch_size:5} {row.milliseconds:9.3f}'
    f' {row.spread:7.1%} {row.madds:13,.0f} {row.speed_up:8.2f}'
    f' {row.madds_reduction:9.2f} {row.realised:8.2f}'
    for row in rows
  ]
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    prog='python -m ds_jax.benchmark', description=__doc__.split('\n\n')[0]
  )
  parser.add_argument('--workdir', required=True, help='a run, to its end')
  parser.add_argument('--batch_sizes', default='1,64')
  parser.add_argument('--num_images', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--json', help='also writes the rows to this file')
  arguments = parser.parse_args(argv)
  predictor = predict.Predictor.restore(arguments.workdir)
  images = _test_images(arguments.workdir, arguments.num_images)
  rows = []
  for batch_size in map(int, arguments.batch_sizes.split(',')):
    rows += measure(predictor, images, batch_size, arguments.repeats)
  device = jax.devices()[0]
  print(f'{device.platform}: {device.device_kind}, jax {jax.__version__}')
  print(table(rows))
  if arguments.json:
    pathlib.Path(arguments.json).write_text(
      json.dumps(
        {
          'device': device.device_kind,
          'jax': jax.__version__,
          'rows': [dataclasses.asdict(row) for row in rows],
        },
        indent=2,
      )
      + '\n'
    )


def _test_images(workdir: str, count: int) -> np.ndarray:
  """The first test images of the run's own data set."""
  meta = checkpoint.restore(checkpoint.directory_of(workdir)).meta
  options = dict(meta['config']['dataset'])
  config = data.DataConfig(**{**options, 'batch_size': count})
  batch = next(data.eval_batches(config))
  return batch['images'][batch['mask']]


if __name__ == '__main__':
  main()
