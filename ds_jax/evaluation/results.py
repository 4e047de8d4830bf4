"""What a sweep found, in numbers, with what a router is held against.

Axes: S sub-networks, K buckets (some of the S), N images.
"""

import dataclasses
from typing import Any

import numpy as np

from ds_jax import routing
from ds_jax.evaluation import analysis
from ds_jax.evaluation import sweep as sweeps

Results = dict[str, Any]


def summarize(
  sweep: sweeps.Sweep,
  model,
  image_size: int,
  *,
  gate_target: routing.GateTarget,
  held_out: routing.Outcomes | None = None,
  routed: sweeps.RoutedSweep | None = None,
) -> Results:
  """Sums a sweep up, with what any router has to be held against.

  Args:
    sweep: of the model's S sub-networks.
    model: the supernet; its arrays are not used.
    image_size: for MAdds.
    gate_target: what the gate was trained for.
    held_out: outcomes of images held out, which budgets are set on; None sets
      them on the sweep's own, which is right for curves and too good for a
      promise.
    routed: of the gate at its target; None takes what that would have done
      from the sweep.

  Returns:
    `subnets`, one row a sub-network; `buckets`, the indices of those that are
    routed to; `routed`, the gate as a `Predictor` uses it; at its mean MAdds
    `static_hull` (the best coin between the buckets) and `best_static` (the
    best bucket at the same or lower MAdds);
    `random`, a router with the gate's shares and no eyes; `oracle`, which takes
    the cheapest right bucket, or the first where none is right; `routers`, each
    router's `Point`s over the range of budgets. Accuracies are in [0, 1].
  """
  costs = routing.BucketCosts.of_model(model, image_size)
  rows = _subnet_rows(sweep, model, image_size)
  if routed is None:
    router = routing.gate_at_target(held_out, costs, gate_target)
    routed = _replayed(sweep, router, costs)
  routed = _routed_row(routed, costs)
  budgets_of = sweep.outcomes if held_out is None else held_out
  buckets = [rows[index] for index in costs.indices]
  return {
    'num_images': len(sweep.outcomes),
    'subnets': rows,
    'buckets': list(costs.indices),
    'routed': routed,
    **_at_equal_cost(routed, buckets, sweep.outcomes.right, costs),
    'oracle': _oracle(sweep.outcomes.right, costs),
    'budgets_set_on': 'test images' if held_out is None else 'held-out images',
    'routers': _router_rows(
      budgets_of, sweep.outcomes, costs, gate_target.utility
    ),
  }


def _subnet_rows(sweep, model, image_size):
  rows = []
  for i, subnet in enumerate(model.sub_networks):
    cost = model.cost(subnet, image_size)
    rows.append(
      {
        'index': i,
        'madds': cost.madds,
        'params': cost.params,
        'top1': float(sweep.top1[i].mean()),
        'top5': float(sweep.top5[i].mean()),
      }
    )
  return rows


def _replayed(sweep, router, costs):
  runs = routing.replay(router, sweep.outcomes)
  images, last = np.arange(len(runs)), np.asarray(costs.indices)[runs[:, 0]]
  return sweeps.RoutedSweep(
    sweep.top1[last, images], sweep.top5[last, images], runs
  )


def _routed_row(routed, costs):
  chosen = routed.runs[:, 0]
  shares = np.bincount(chosen, minlength=len(costs.branches)) / len(chosen)
  return {
    'top1': float(routed.top1.mean()),
    'top5': float(routed.top5.mean()),
    'madds': float(shares @ costs.buckets),
    'shares': shares.tolist(),
  }


def _at_equal_cost(routed, buckets, right, costs):
  """The hull, the best bucket and the gate's shares at the gate's MAdds."""
  top1 = [row['top1'] for row in buckets]
  hull = analysis.static_hull(routed['madds'], right, costs)
  return {
    'static_hull': {
      'top1': float(hull.mean()),
      'madds': routed['madds'],
    },
    'best_static': _best_static(buckets, routed['madds']),
    'random': {
      'top1': float(np.dot(routed['shares'], top1)),
      'madds': routed['madds'],
    },
  }


def _best_static(rows, madds):
  """The best row that costs no more than `madds`, up to rounding."""
  affordable = [r for r in rows if r['madds'] <= madds * (1 + 1e-9)]
  best = max(affordable, key=lambda r: r['top1'])
  return {k: best[k] for k in ('index', 'madds', 'top1')}


def _oracle(right, costs):
  # argmax is the first right bucket, and 0 where none is.
  chosen = right.argmax(1)
  shares = np.bincount(chosen, minlength=len(costs.branches)) / len(chosen)
  return {
    'top1': float(right.any(1).mean()),
    'madds': float(shares @ costs.buckets),
    'shares': shares.tolist(),
  }


def _router_rows(held_out, outcomes, costs, utility):
  """Every router's points, at each twentieth of the largest bucket's MAdds."""
  low, high = costs.buckets[0], costs.buckets[-1]
  steps = np.arange(1, 21) / 20 * high
  budgets = [float(low), *(m for m in steps if m > low)]
  dials: dict[str, routing.Dial] = {
    'gate': routing.GateDial(held_out, costs, utility)
  }
  for score in routing.SCORES:
    dials[f'cascade, {score}'] = routing.CascadeDial(
      held_out, costs, score=score
    )
  if len(costs.branches) > 2:
    ladder = (0, len(costs.branches) // 2, len(costs.branches) - 1)
    rungs = tuple(costs.indices[bucket] for bucket in ladder)
    dials[f'ladder {rungs}'] = routing.CascadeDial(held_out, costs, ladder)
  return {
    name: [
      dataclasses.asdict(point)
      for point in analysis.curve(dial, budgets, outcomes, costs)
    ]
    for name, dial in dials.items()
  }
