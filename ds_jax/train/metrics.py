"""Scalars to JSON lines always, and to clu's writers where it has TensorFlow.

clu's writers (log and TensorBoard event files) need TensorFlow and tensorboard,
the `tf` extra; without them the same scalars go to the plain log.
"""

import importlib.util
import json
import pathlib
from collections.abc import Mapping

from absl import logging


class MetricWriter:
  """Writes scalars by global step; one process writes, the others don't."""

  def __init__(self, workdir: pathlib.Path, *, enabled: bool = True):
    """Opens `metrics.jsonl` in the workdir to append."""
    self._file = None
    self._clu = None
    if not enabled:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    self._file = (workdir / 'metrics.jsonl').open('a')
    if _has_clu_writers():
      # Imported here: it takes seconds and TensorFlow.
      from clu import metric_writers

      self._clu = metric_writers.create_default_writer(
        str(workdir), asynchronous=False
      )

  def write(self, step: int, stage: str, scalars: Mapping[str, float]) -> None:
    """Writes one row.

    A step that is run again after a kill appears again; the later row counts.

    Args:
      step: over all stages.
      stage: becomes a prefix of the names in TensorBoard.
      scalars: name to value.
    """
    if self._file is None:
      return
    row = {'step': step, 'stage': stage, **scalars}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    if self._clu:
      self._clu.write_scalars(
        step, {f'{stage}/{name}': value for name, value in scalars.items()}
      )
    else:
      values = ', '.join(f'{k} {v:.4g}' for k, v in scalars.items())
      logging.info('[%d] %s: %s', step, stage, values)

  def close(self) -> None:
    """Writes out what is buffered."""
    if self._file is not None:
      self._file.close()
    if self._clu:
      self._clu.close()


def _has_clu_writers() -> bool:
  return all(importlib.util.find_spec(m) for m in ('tensorflow', 'tensorboard'))
