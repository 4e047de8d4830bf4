"""Predicts picture files with a run, or a conversion.

    python -m ds_jax.predict --workdir=runs/clipart --fraction=0.4 PICTURES...

PICTURES are files, folders, or globs; - reads paths from standard input, one a
line. A file that can't be read has the error in its row, the others are
answered all the same, and the exit status is 1.
"""

import argparse
import concurrent.futures
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ds_jax import checkpoint, cpu, inference
from ds_jax.inference import batching, images

_EXPECTED = (ImportError, OSError, ValueError, checkpoint.CheckpointError)
_COLUMNS = (
  *('path', 'label', 'class_name', 'probability', 'bucket', 'madds'),
  *('top', 'error'),
)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a row a file; exits with 1 if one could not be read."""
  options = _parser().parse_args(argv)
  cpu.keep_freed_memory()
  for stream in (sys.stdin, sys.stdout):
    # Names of files need not be text.
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='surrogateescape')
  try:
    paths = _paths(options.pictures)
    predictor = _predictor(options)
    rows = predict_files(
      predictor, paths, subnet=options.subnet, num_top=options.top
    )
    rows = _with_progress(rows, len(paths))
    failed = _WRITERS[options.form](rows)
  except _EXPECTED as error:
    sys.exit(f'{type(error).__name__}: {error}')
  sys.exit(1 if failed else 0)


def predict_files(
  predictor: inference.Predictor,
  paths: Iterable[str | os.PathLike],
  *,
  subnet: int | None = None,
  num_top: int = 1,
) -> Iterator[dict[str, Any]]:
  """Gives a row a file, in order; files are read while others are predicted.

  Args:
    predictor: any.
    paths: of picture files.
    subnet: as of the predictor's call.
    num_top: how many classes `top` has.

  Returns:
    Dicts of `path`, `label`, `class_name`, `probability`, `bucket`, `madds` and
    `top` (pairs of name and probability); or of `path` and `error`.
  """

  def read(path):
    try:
      return predictor.preparation.one(path)
    except IsADirectoryError:
      return f'{path}: no picture in it.'
    except FileNotFoundError:
      return f'{path}: no such file.'
    except (OSError, ValueError) as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    waiting = []
    for chunk in _chunks(paths, batching.LIMIT):
      waiting.append((chunk, [threads.submit(read, path) for path in chunk]))
      if len(waiting) == 2:
        yield from _rows(predictor, *waiting.pop(0), subnet, num_top)
    for chunk, futures in waiting:
      yield from _rows(predictor, chunk, futures, subnet, num_top)


def _rows(predictor, paths, futures, subnet, num_top):
  found = [future.result() for future in futures]
  good = [image for image in found if not isinstance(image, str)]
  if good:
    prediction = predictor(np.stack(good), subnet=subnet)
    tops = prediction.top(num_top)
  i = 0
  for path, image in zip(paths, found, strict=True):
    if isinstance(image, str):
      yield {'path': str(path), 'error': image}
      continue
    name, probability = tops[i][0]
    yield {
      'path': str(path),
      'label': int(prediction.labels[i]),
      'class_name': name,
      'probability': probability,
      'bucket': int(prediction.buckets[i]),
      'madds': int(prediction.madds[i]),
      'top': tops[i],
    }
    i += 1


def _chunks(items, size):
  iterator = iter(items)
  while chunk := list(itertools.islice(iterator, size)):
    yield chunk


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m ds_jax.predict',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('pictures', nargs='+', metavar='PICTURES')
  parser.add_argument('--workdir', required=True, help='of a run, to its end')
  budget = parser.add_mutually_exclusive_group()
  budget.add_argument(
    '--fraction',
    type=float,
    help="mean cost of an image, as a share of the largest bucket's",
  )
  budget.add_argument('--madds', type=float, help='the same, in multiply-adds')
  budget.add_argument(
    '--subnet', type=int, help='this sub-network for all, by its index'
  )
  parser.add_argument('--router', choices=('gate', 'cascade'), default='gate')
  parser.add_argument(
    '--top', type=int, default=1, help='how many classes to name'
  )
  form = parser.add_mutually_exclusive_group()
  for name in ('csv', 'json'):
    form.add_argument(
      f'--{name}',
      dest='form',
      action='store_const',
      const=name,
      help={'csv': 'print CSV', 'json': 'print a JSON object a line'}[name],
    )
  parser.set_defaults(form='table')
  return parser


def _predictor(options) -> inference.Predictor:
  has_budget = options.fraction is not None or options.madds is not None
  if options.router != 'gate' and not has_budget:
    raise ValueError(
      f'--router={options.router} needs a budget: --fraction=0.4'
    )
  if options.top < 1:
    raise ValueError(f'--top={options.top}: expected at least 1.')
  predictor = inference.Predictor.restore(options.workdir)
  if has_budget:
    return predictor.with_budget(
      options.madds, fraction=options.fraction, router=options.router
    )
  return predictor


def _paths(patterns) -> list[str]:
  """Returns the files; a pattern itself where there is none."""
  found = []
  for pattern in patterns:
    lines = [pattern]
    if pattern == '-':
      lines = [line for line in sys.stdin.read().splitlines() if line]
    for line in lines:
      try:
        found += map(str, images.files(line))
      except FileNotFoundError:
        found.append(line)
  return found


def _with_progress(rows, total):
  # Imported here: of use to this command alone.
  import tqdm

  yield from tqdm.tqdm(rows, total=total, unit=' images', disable=None)


def _write_table(rows) -> int:
  failed = 0
  for row in rows:
    if 'error' in row:
      failed += 1
      print(f'{row["path"]}: error: {row["error"]}')
      continue
    top = ', '.join(f'{name} {share:.3f}' for name, share in row['top'])
    print(f'{row["path"]}: {top} (bucket {row["bucket"]})')
  return failed


def _write_csv(rows) -> int:
  writer = csv.DictWriter(sys.stdout, _COLUMNS)
  writer.writeheader()
  failed = 0
  for row in rows:
    failed += 'error' in row
    if 'top' in row:
      top = ' '.join(f'{name}={share:.6f}' for name, share in row['top'])
      row = {**row, 'top': top}
    writer.writerow(row)
  return failed


def _write_json(rows) -> int:
  failed = 0
  for row in rows:
    failed += 'error' in row
    print(json.dumps(row, ensure_ascii=False), flush=True)
  return failed


_WRITERS = {'table': _write_table, 'csv': _write_csv, 'json': _write_json}


if __name__ == '__main__':
  main()
