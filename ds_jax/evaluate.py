"""One sweep over the test images: every sub-network, and the gate.

Axes: S sub-networks, K buckets (the first K of the S), N images, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import mesh as mesh_lib
from ds_jax import models

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What every sub-network and the gate did on every image.

  Attributes:
    top1: (S, N) bool, whether the largest logit is the label's.
    top5: (S, N) bool, whether the label is among the five largest.
    buckets: (N,) int, the gate's choice.
  """

  top1: np.ndarray
  top5: np.ndarray
  buckets: np.ndarray


class Evaluator:
  """Runs sub-networks over batches of test images."""

  def __init__(
    self,
    model,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
  ):
    """Compiles nothing yet.

    Args:
      model: the supernet; its arrays are not used.
      normalize: uint8 images to the model's floats.
      mesh: the devices.
    """
    self._architecture = models.Architecture(model)
    self._sub_networks = models.sub_networks(model)
    self._ends = (model.narrowest, model.widest)
    self._normalize = normalize
    self._mesh = mesh
    self._run = jax.jit(
      self._run_batch,
      static_argnames='subnets',
      out_shardings=mesh_lib.replicated(mesh),
    )

  def sweep(
    self, variables: models.Variables, batches: Iterable[dict[str, np.ndarray]]
  ) -> Sweep:
    """Runs every sub-network and the gate.

    Args:
      variables: the network.
      batches: this process's `images` uint8 (n, H, W, 3), `labels` (n,) and
        `mask` (n,), False where there is no image.

    Returns:
      The outcome of all processes' images.
    """
    return self._collect(variables, batches, self._sub_networks)

  def ends(self, variables, batches) -> dict[str, float]:
    """Returns the top-1 of the narrowest and widest, and their mean."""
    narrowest, widest = self._collect(variables, batches, self._ends).top1.mean(
      1
    )
    return {
      'top1/narrowest': float(narrowest),
      'top1/widest': float(widest),
      'top1': float((narrowest + widest) / 2),
    }

  def _collect(self, variables, batches, subnets) -> Sweep:
    variables = jax.device_put(variables, mesh_lib.replicated(self._mesh))
    parts = []
    for batch in batches:
      batch = mesh_lib.shard_batch(self._mesh, batch)
      parts.append(self._run(variables, batch, subnets=subnets))
      # One batch runs while the next is read, and no more are on the way.
      jax.block_until_ready(parts[-2:-1])
    top1, top5, buckets, mask = (
      np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)
    )
    return Sweep(top1[:, mask], top5[:, mask], buckets[mask])

  def _run_batch(self, variables, batch, subnets):
    model = self._architecture.bind(variables)
    images, labels = self._normalize(batch['images']), batch['labels']
    features = model.trunk(images)
    buckets = model.gate_logits(features).argmax(-1)
    hits = []
    for subnet in subnets:
      routed = subnet in model.routing_space
      logits = (
        model.branch(features, subnet) if routed else model(images, subnet)
      )
      hits.append(_hits(logits, labels))
    top1, top5 = (jnp.stack(h) for h in zip(*hits, strict=True))
    return top1, top5, buckets, batch['mask']


def _hits(logits, labels):
  """Whether (N, C) logits put the label first, and among the first five."""
  first = logits.argmax(-1) == labels
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  return first, (best == labels[:, None]).any(-1)


def results(
  sweep: Sweep, costs: Sequence[models.Cost], num_buckets: int
) -> Results:
  """Sums a sweep up, with what any router has to be held against.

  Args:
    sweep: of S sub-networks, the K buckets first.
    costs: of the S sub-networks, per image.
    num_buckets: K.

  Returns:
    `subnets`, one row a sub-network; `routed`, the gate; at the gate's mean
    MAdds `static_line` (the straight line between the static sub-networks) and
    `best_static` (the best at the same or lower MAdds); `random`, a router
    with the gate's shares and no eyes; `oracle`, which takes the cheapest
    right bucket, or the first where none is right. Accuracies are in [0, 1].
  """
  rows = [
    {
      'index': i,
      'madds': cost.madds,
      'params': cost.params,
      'top1': float(sweep.top1[i].mean()),
      'top5': float(sweep.top5[i].mean()),
    }
    for i, cost in enumerate(costs)
  ]
  buckets = rows[:num_buckets]
  madds = np.asarray([r['madds'] for r in buckets], np.float64)
  top1 = np.asarray([r['top1'] for r in buckets])
  shares = np.bincount(sweep.buckets, minlength=num_buckets)
  shares = shares / shares.sum()
  routed = {
    'top1': _take(sweep.top1, sweep.buckets),
    'top5': _take(sweep.top5, sweep.buckets),
    'madds': float(shares @ madds),
    'shares': shares.tolist(),
  }
  return {
    'num_images': len(sweep.buckets),
    'subnets': rows,
    'routed': routed,
    'static_line': {
      'top1': float(np.interp(routed['madds'], madds, top1)),
      'madds': routed['madds'],
    },
    'best_static': _best_static(buckets, routed['madds']),
    'random': {'top1': float(shares @ top1), 'madds': routed['madds']},
    'oracle': _oracle(sweep.top1[:num_buckets], madds),
  }


def _take(hits, buckets) -> float:
  return float(hits[buckets, np.arange(len(buckets))].mean())


def _best_static(rows, madds):
  """The best row that costs no more than `madds`, up to rounding."""
  affordable = [r for r in rows if r['madds'] <= madds * (1 + 1e-9)]
  best = max(affordable, key=lambda r: r['top1'])
  return {k: best[k] for k in ('index', 'madds', 'top1')}


def _oracle(right, madds):
  # argmax is the first right bucket, and 0 where none is.
  chosen = right.argmax(0)
  return {
    'top1': float(right.any(0).mean()),
    'madds': float(madds[chosen].mean()),
    'shares': (
      np.bincount(chosen, minlength=len(madds)) / len(chosen)
    ).tolist(),
  }


def table(results: Results) -> str:
  """Returns `results` as text for people."""
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
  for name in ('routed', 'static_line', 'best_static', 'random', 'oracle'):
    add(name, results[name])
  shares = ' '.join(f'{share:.1%}' for share in results['routed']['shares'])
  return '\n'.join([*lines, f'Images per bucket: {shares}'])
