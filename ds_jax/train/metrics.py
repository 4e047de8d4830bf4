"""Scalars to JSON lines and the log, and to TensorBoard where it is wanted.

By tensorboardX, the extra `tensorboard`: clu's writers need TensorFlow.
"""

import json
import pathlib
from collections.abc import Mapping

from absl import logging


class MetricWriter:
  """Writes scalars by global step; one process writes, the others don't."""

  def __init__(self, workdir: pathlib.Path, *, enabled: bool = True):
    """Opens `metrics.jsonl` in the workdir to append, and an event file."""
    self._file = None
    self._events = None
    if not enabled:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    self._file = (workdir / 'metrics.jsonl').open('a')
    try:
      # Imported here: an option.
      import tensorboardX
    except ImportError:
      logging.info(
        'No TensorBoard files without tensorboardX: pip install -e'
        " '.[tensorboard]'."
      )
      return
    self._events = tensorboardX.SummaryWriter(str(workdir))

  def write(self, step: int, phase: str, scalars: Mapping[str, float]) -> None:
    """Writes one row.

    A step that is run again after a kill appears again; the later row counts.

    Args:
      step: over all phases.
      phase: becomes a prefix of the names in TensorBoard.
      scalars: name to value.
    """
    if self._file is None:
      return
    row = {'step': step, 'phase': phase, **scalars}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    if self._events:
      for name, value in scalars.items():
        self._events.add_scalar(f'{phase}/{name}', value, step)
    values = ', '.join(f'{k} {v:.4g}' for k, v in scalars.items())
    logging.info('[%d] %s: %s', step, phase, values)

  def close(self) -> None:
    """Writes out what is buffered."""
    if self._file is not None:
      self._file.close()
    if self._events:
      self._events.close()
