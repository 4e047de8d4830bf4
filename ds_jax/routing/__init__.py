"""Routing: which sub-networks run for an image, and what that is worth."""

from ds_jax.routing.analysis import (
  Point,
  curve,
  ensemble,
  hull_corners,
  static_hull,
)
from ds_jax.routing.budget import (
  BudgetError,
  CascadeDial,
  Dial,
  GateDial,
  check_budget,
  gate_at_target,
  utility_of,
)
from ds_jax.routing.dispatch import dispatch_images, tiled_dispatch
from ds_jax.routing.outcomes import (
  BucketCosts,
  Outcomes,
  empty_outcomes,
  images_held_out,
  observe,
  replay,
  right_answers,
)
from ds_jax.routing.router import (
  SCORES,
  Routed,
  Router,
  cascade_router,
  gate_router,
  last_bucket,
  route,
)

__all__ = [
  'SCORES',
  'BucketCosts',
  'BudgetError',
  'CascadeDial',
  'Dial',
  'GateDial',
  'Outcomes',
  'Point',
  'Routed',
  'Router',
  'cascade_router',
  'check_budget',
  'curve',
  'dispatch_images',
  'empty_outcomes',
  'ensemble',
  'gate_at_target',
  'gate_router',
  'hull_corners',
  'images_held_out',
  'last_bucket',
  'observe',
  'replay',
  'right_answers',
  'route',
  'static_hull',
  'tiled_dispatch',
  'utility_of',
]
