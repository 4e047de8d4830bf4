"""Routing: which sub-networks run for an image, and what that is worth."""

from ds_jax.routing.budget import (
  BudgetError,
  CascadeDial,
  Dial,
  GateDial,
  GateTarget,
  check_budget,
  gate_at_target,
)
from ds_jax.routing.dispatch import dispatch_images, tiled_dispatch
from ds_jax.routing.outcomes import (
  BucketCosts,
  Outcomes,
  images_held_out,
  observe,
  replay,
  right_answers,
)
from ds_jax.routing.router import (
  SCORES,
  Network,
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
  'GateTarget',
  'Network',
  'Outcomes',
  'Routed',
  'Router',
  'cascade_router',
  'check_budget',
  'dispatch_images',
  'gate_at_target',
  'gate_router',
  'images_held_out',
  'last_bucket',
  'observe',
  'replay',
  'right_answers',
  'route',
  'tiled_dispatch',
]
