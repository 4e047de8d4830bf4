"""A benchmark's rows as a table, as JSON and as a plot."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from ds_jax.benchmark import timing


def table(rows: Sequence[timing.Row], matmul_rate: float) -> str:
  """Returns the rows as text for people.

  `realised` is the speed-up over the row compared with, divided by how many
  times fewer multiply-adds; 1 means that all of the saving is real.
  """
  lines = []
  for section in dict.fromkeys(row.section for row in rows):
    lines += [
      '',
      f'{section:32} {"batch":>5} {"ms/image":>10} {"spread":>7}'
      f' {"images/s":>9} {"MAdds":>14} {"of matmul":>9} {"speed-up":>8}'
      f' {"fewer":>6} {"realised":>8} {"first s":>8}',
    ]
    for row in rows:
      if row.section == section:
        lines.append(_line(row, reference_of(row, rows), matmul_rate))
  return '\n'.join(lines[1:])


def reference_of(
  row: timing.Row, rows: Sequence[timing.Row]
) -> timing.Row | None:
  """Returns the row that this one is compared with, if there is one."""
  for other in rows:
    if (other.section, other.name, other.batch_size) == (
      row.section,
      row.reference,
      row.batch_size,
    ):
      return other
  return None


def _line(row, reference, matmul_rate):
  share = f'{row.madds_per_second / matmul_rate:.2f}' if row.madds else ''
  speed_up = fewer = realised = ''
  if reference:
    times, less = reference.median / row.median, reference.madds / row.madds
    speed_up, fewer, realised = f'{times:.2f}', f'{less:.2f}', times / less
    realised = f'{realised:.2f}'
  madds = f'{row.madds:,.0f}' if row.madds else ''
  return (
    f'{row.name:32} {row.batch_size:5}'
    f' {1e3 * row.per_image:10.3f} {row.spread:7.1%}'
    f' {1 / row.per_image:9.1f} {madds:>14} {share:>9}'
    f' {speed_up:>8} {fewer:>6} {realised:>8} {row.first_call:8.2f}'
  )


def write(
  path: pathlib.Path, about: Mapping, rows: Sequence[timing.Row], results
) -> None:
  """Writes everything: what was measured on what, ratios, and raw times."""
  written = {
    **about,
    **results,
    'rows': [
      {
        **vars(row),
        'median': row.median,
        'spread': row.spread,
      }
      for row in rows
    ],
  }
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(json.dumps(written, indent=2) + '\n')
  partial.replace(path)


def plot(rows: Sequence[timing.Row], path: pathlib.Path) -> None:
  """Draws an image's time against its MAdds, a line for each batch size.

  Nothing, where sub-networks were not measured.

  Raises:
    ImportError: without matplotlib.
  """
  # Imported here: an option.
  from matplotlib import figure

  chosen = [row for row in rows if row.name.endswith(', own weights')]
  if not chosen:
    return
  canvas = figure.Figure(figsize=(7, 4.5), layout='constrained')
  axes = canvas.subplots()
  for batch_size in dict.fromkeys(row.batch_size for row in chosen):
    points = [row for row in chosen if row.batch_size == batch_size]
    axes.plot(
      [row.madds / 1e6 for row in points],
      [1e3 * row.per_image for row in points],
      'o-',
      label=f'batch {batch_size}',
    )
  axes.set_xlabel('million multiply-adds')
  axes.set_ylabel('ms an image')
  axes.set_xlim(left=0)
  axes.set_ylim(bottom=0)
  axes.legend()
  canvas.savefig(path, dpi=120)
