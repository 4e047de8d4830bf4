"""One sweep over the test images: every sub-network, and the routers.

Axes: S sub-networks, K buckets (some of the S), N images, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import models, parallel, routing

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What every sub-network and the gate did on every image.

  Attributes:
    top1: (S, N) bool, whether the largest logit is the label's.
    top5: (S, N) bool, whether the label is among the five largest.
    outcomes: of the buckets, on the same images; None where not all ran.
  """

  top1: np.ndarray
  top5: np.ndarray
  outcomes: routing.Outcomes | None


@dataclasses.dataclass(frozen=True)
class RoutedSweep:
  """What a router did with every image.

  Attributes:
    top1: (N,) bool, as of a `Sweep`.
    top5: (N,) bool.
    runs: (N, R) which buckets ran; see `routing.Routed`.
  """

  top1: np.ndarray
  top5: np.ndarray
  runs: np.ndarray


class Evaluator:
  """Runs sub-networks over batches of test images, each device by itself."""

  def __init__(
    self,
    model,
    normalize: Callable[[jax.Array], jax.Array],
    executor: parallel.Executor,
  ):
    """Compiles nothing yet.

    Args:
      model: the supernet; its arrays are not used.
      normalize: uint8 images to the model's floats.
      executor: runs the networks on the devices.
    """
    self._architecture = models.Architecture(model)
    self._sub_networks = model.sub_networks
    self._ends = (model.narrowest, model.widest)
    self._normalize = normalize
    # No statistics are taken here, so nothing ties the devices' rows together;
    # and tiles are best cut where the images are.
    self._executor = executor = executor.replicas()
    self._run = executor.compile(
      self._run_batch,
      [parallel.STATE, parallel.BATCH],
      parallel.WHOLE,
      static=['subnets'],
    )
    # Shards are gathered once, and not for every batch.
    self._gather = executor.compile(
      lambda tree: tree, [parallel.STATE], parallel.WHOLE
    )
    self._route = executor.compile(
      self._route_batch,
      [parallel.STATE, parallel.WHOLE, parallel.BATCH],
      parallel.WHOLE,
    )

  def sweep(
    self, variables: models.Variables, batches: Iterable[dict[str, np.ndarray]]
  ) -> Sweep:
    """Runs every sub-network and the gate.

    Args:
      variables: the network, as laid out by the executor.
      batches: this process's `images` uint8 (n, H, W, 3), `labels` (n,) and
        `mask` (n,), False where there is no image.

    Returns:
      The outcome of all processes' images.
    """
    return self._collect(variables, batches, self._sub_networks)

  def routed_sweep(
    self,
    variables: models.Variables,
    router: routing.Router,
    batches: Iterable[dict[str, np.ndarray]],
  ) -> RoutedSweep:
    """Routes every image, by the dispatch that a `Predictor` has.

    Args:
      variables: as in `sweep`.
      router: which buckets run for an image.
      batches: as in `sweep`.
    """
    run = functools.partial(self._route, self._gather(variables), router)
    hits, runs = self._over(batches, run)
    return RoutedSweep(hits[:, 0], hits[:, 1], runs)

  def ends(self, variables, batches) -> dict[str, float]:
    """Returns the top-1 of the narrowest and widest, and their mean."""
    top1 = self._collect(variables, batches, self._ends).top1.mean(1)
    narrowest, widest = top1
    return {
      'top1/narrowest': float(narrowest),
      'top1/widest': float(widest),
      'top1': float((narrowest + widest) / 2),
    }

  def _collect(self, variables, batches, subnets) -> Sweep:
    variables = self._gather(variables)
    run = functools.partial(self._run, variables, subnets=subnets)
    hits, outcomes = self._over(batches, run)
    return Sweep(*hits.transpose(2, 1, 0), outcomes)

  def _over(self, batches, run):
    """Returns the rows of all batches, but for those that fill them up."""
    parts = []
    for batch in batches:
      parts.append(run(self._executor.put_batch(batch)))
      # One batch runs while the next is read, and no more are on the way.
      jax.block_until_ready(parts[-2:-1])
    rows, mask = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    return jax.tree.map(lambda rows: rows[mask], rows)

  def _run_batch(self, variables, batch, subnets):
    """Returns hits (N, S, 2), outcomes where all buckets ran, and the mask."""
    model = self._architecture.bind(variables)
    images, labels = self._normalize(batch['images']), batch['labels']
    features = model.trunk(images)
    logits = {
      subnet: model.branch(features, subnet)
      if model.shares_trunk(subnet)
      else model(images, subnet)
      for subnet in subnets
    }
    outcomes = None
    if set(model.routing_space) <= set(subnets):
      buckets = [logits[subnet] for subnet in model.routing_space]
      outcomes = routing.observe(
        model.gate_logits(features), jnp.stack(buckets, 1), labels
      )
    hits = jnp.stack([_hits(x, labels) for x in logits.values()], 1)
    return self._executor.all_rows(((hits, outcomes), batch['mask']))

  def _route_batch(self, variables, router, batch):
    """Returns hits (N, 2) and the runs (N, R), and the mask."""
    model = self._architecture.bind(variables)
    features = model.trunk(self._normalize(batch['images']))
    branches = [
      functools.partial(model.branch, subnet=s) for s in model.routing_space
    ]
    routed = routing.route(
      router, branches, model.gate_logits(features), features
    )
    rows = _hits(routed.logits, batch['labels']), routed.runs
    return self._executor.all_rows((rows, batch['mask']))


def _hits(logits, labels):
  """(N, 2) of logits (N, C): whether the label is first, and in the first 5."""
  first = logits.argmax(-1) == labels
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  return jnp.stack([first, (best == labels[:, None]).any(-1)], axis=1)


def results(
  sweep: Sweep,
  model,
  image_size: int,
  *,
  gate: Mapping[str, Any],
  held_out: routing.Outcomes | None = None,
  routed: RoutedSweep | None = None,
) -> Results:
  """Sums a sweep up, with what any router has to be held against.

  Args:
    sweep: of the model's S sub-networks.
    model: the supernet; its arrays are not used.
    image_size: for MAdds.
    gate: `target` and `target_madds` of the gate's config.
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
    router's `Point`s over the range of budgets; `ensemble`, whether averaging
    two buckets' logits helps. Accuracies are in [0, 1].
  """
  costs = routing.BucketCosts.of_model(model, image_size)
  rows = _subnet_rows(sweep, model, image_size)
  if routed is None:
    router = routing.gate_at_target(held_out, costs, **gate)
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
      budgets_of, sweep.outcomes, costs, routing.utility_of(gate['target'])
    ),
    'ensemble': routing.ensemble(budgets_of, sweep.outcomes),
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
  return RoutedSweep(sweep.top1[last, images], sweep.top5[last, images], runs)


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
  hull = routing.static_hull(routed['madds'], right, costs)
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
  """Every router's points, at each twentieth of the dearest bucket's MAdds."""
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
      for point in routing.curve(dial, budgets, outcomes, costs)
    ]
    for name, dial in dials.items()
  }
