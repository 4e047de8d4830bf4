"""Evaluation: what the sub-networks and the routers of a run are worth."""

from ds_jax.evaluation.analysis import Point, curve, hull_corners, static_hull
from ds_jax.evaluation.report import plot, table, write
from ds_jax.evaluation.results import Results, summarize
from ds_jax.evaluation.sweep import Evaluator, RoutedSweep, Sweep

__all__ = [
  'Evaluator',
  'Point',
  'Results',
  'RoutedSweep',
  'Sweep',
  'curve',
  'hull_corners',
  'plot',
  'static_hull',
  'summarize',
  'table',
  'write',
]
