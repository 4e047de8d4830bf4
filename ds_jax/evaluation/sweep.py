"""A sweep over images: every sub-network, and a router.

Axes: S sub-networks, K buckets (some of the S), N images, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import models, parallel, routing


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
  """Runs sub-networks over batches of test images, each device on its own."""

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
    self._routing_space = model.routing_space
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

  def held_out(
    self, variables: models.Variables, batches: Iterable[dict[str, np.ndarray]]
  ) -> routing.Outcomes:
    """Returns what the buckets and the gate say of images held out.

    From it a router for any budget is made in a moment; see `routing.budget`.

    Args:
      variables: as in `sweep`.
      batches: as in `sweep`.
    """
    return self._collect(variables, batches, self._routing_space).outcomes

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
    answers = model.all_buckets(images, subnets)
    logits = dict(zip(subnets, answers.logits, strict=True))
    outcomes = None
    if set(model.routing_space) <= set(subnets):
      buckets = [logits[subnet] for subnet in model.routing_space]
      outcomes = routing.observe(
        answers.gate_logits, jnp.stack(buckets, 1), labels
      )
    rows = jnp.stack([_hits(x, labels) for x in answers.logits], 1), outcomes
    return self._executor.all_rows((rows, batch['mask']))

  def _route_batch(self, variables, router, batch):
    """Returns hits (N, 2) and the runs (N, R), and the mask."""
    model = self._architecture.bind(variables)
    network = routing.Network(
      lambda images: model.trunk(self._normalize(images)),
      model.gate_logits,
      [functools.partial(model.branch, subnet=s) for s in model.routing_space],
    )
    routed = routing.route(router, network, batch['images'])
    rows = _hits(routed.logits, batch['labels']), routed.runs
    return self._executor.all_rows((rows, batch['mask']))


def _hits(logits, labels):
  """(N, 2) of logits (N, C): whether the label is first, and in the first 5."""
  first = logits.argmax(-1) == labels
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  return jnp.stack([first, (best == labels[:, None]).any(-1)], axis=1)
