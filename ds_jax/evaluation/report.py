"""An evaluation's results on disk, as a table and as a plot."""

import json
import math
import pathlib

import numpy as np
from absl import logging

from ds_jax.evaluation import analysis
from ds_jax.evaluation.results import Results

# Shares of the largest bucket's MAdds that the table shows.
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def write(results: Results, workdir: pathlib.Path) -> None:
  """Writes `results.json`, and `routing.png` where matplotlib is installed."""
  path = workdir / 'results.json'
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(results, indent=2) + '\n')
  partial.replace(path)
  try:
    plot(results, workdir / 'routing.png')
  except ImportError:
    logging.info("No plot without matplotlib: pip install -e '.[plot]'.")


def table(results: Results) -> str:
  """Returns `results` as text for people."""
  shares = ', '.join(
    f'{bucket}: {share:.1%}'
    for bucket, share in zip(
      results['buckets'], results['routed']['shares'], strict=True
    )
  )
  return '\n'.join(
    [
      *_subnet_lines(results),
      f'Images per bucket: {shares}',
      '',
      *_router_lines(results),
    ]
  )


def _subnet_lines(results):
  widest = max(row['madds'] for row in results['subnets'])
  lines = [
    f'{"":>14} {"top-1 %":>8} {"top-5 %":>8} {"MAdds":>15} {"of widest":>9}'
  ]

  def add(name, row):
    top5 = f'{100 * row["top5"]:8.2f}' if 'top5' in row else ' ' * 8
    lines.append(
      f'{name:>14} {100 * row["top1"]:8.2f} {top5} {row["madds"]:15,.0f}'
      f' {row["madds"] / widest:9.1%}'
    )

  for row in results['subnets']:
    add(f'subnet {row["index"]}', row)
  for name in ('routed', 'static_hull', 'best_static', 'random', 'oracle'):
    add(name, results[name])
  return lines


def _router_lines(results):
  """Top-1, and the gain over the hull, at shares of the largest's MAdds."""
  largest = _largest(results)
  lines = [
    "Top-1 % at a share of the largest bucket's MAdds, and the gain over the"
    f' hull; budgets set on the {results["budgets_set_on"]}.',
    ' ' * 22 + ''.join(f'{share:>14.0%}' for share in _SHARES),
  ]
  for name, points in results['routers'].items():
    cells = []
    for share in _SHARES:
      near = [p for p in points if math.isclose(p['budget'], share * largest)]
      cells.append(
        f'{100 * near[0]["top1"]:.2f} {100 * near[0]["gain"]:+.2f}'
        if near
        else '-'
      )
    lines.append(f'{name:>22}' + ''.join(f'{cell:>14}' for cell in cells))
  return lines


def _largest(results) -> float:
  return max(row['madds'] for row in _buckets(results))


def _buckets(results):
  return [results['subnets'][index] for index in results['buckets']]


def plot(results: Results, path: pathlib.Path) -> None:
  """Draws top-1 against MAdds for the buckets, every router and the oracle.

  The buckets have their hull, what the best coin between them gets.

  Args:
    results: of `evaluation.summarize`.
    path: of the image; its ending tells the format.

  Raises:
    ImportError: without matplotlib.
  """
  # Imported here: an option.
  from matplotlib import figure

  largest = _largest(results)
  canvas = figure.Figure(figsize=(8, 4), layout='constrained')
  axes = canvas.subplots()
  buckets = _buckets(results)
  _plot_static(
    axes,
    np.array([row['madds'] / largest for row in buckets]),
    np.array([100 * row['top1'] for row in buckets]),
  )
  for name, points in results['routers'].items():
    axes.errorbar(
      [p['madds'] / largest for p in points],
      [100 * p['top1'] for p in points],
      [100 * p['gain_error'] for p in points],
      label=name,
      linewidth=1,
    )
  some = next(iter(results['routers'].values()))
  axes.plot(
    [p['madds'] / largest for p in some],
    [100 * p['oracle'] for p in some],
    'k:',
    label='oracle',
  )
  axes.set_xlabel("mean MAdds, as a share of the largest bucket's")
  axes.set_ylabel('top-1, %')
  canvas.legend(loc='outside right upper')
  canvas.savefig(path, dpi=120)


def _plot_static(axes, madds, top1):
  axes.plot(madds, top1, 'ko', label='static sub-networks')
  corners = analysis.hull_corners(madds, top1)
  hull = np.interp(madds, madds[corners], top1[corners])
  axes.plot(madds, hull, 'k-', label='hull')
