"""Routed inference from a checkpoint.

Axes: N images, H, W, K buckets, C classes.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import (
  checkpoint,
  compiler,
  data,
  models,
  paths,
  routing,
  validation,
)
from ds_jax.inference import batching
from ds_jax.inference import images as images_lib
from ds_jax.inference import parts as parts_lib

# Lines of a prediction's table.
_MAX_LINES = 10


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction:
  """What the network says of each image, and what that cost.

  It prints as a table of the first few.

  Attributes:
    logits: (N, C) float32.
    labels: (N,) int32, the largest logit.
    buckets: (N,) int32, the index of the sub-network whose answer it is.
    madds: (N,) int64, multiply-adds spent, on all sub-networks that ran.
    class_names: C, of the labels; None where they are not known.
  """

  logits: np.ndarray
  labels: np.ndarray
  buckets: np.ndarray
  madds: np.ndarray
  class_names: tuple[str, ...] | None = None

  @property
  def probabilities(self) -> np.ndarray:
    """(N, C) float32, the softmax of the logits."""
    shifted = self.logits - self.logits.max(-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(-1, keepdims=True)

  def name_of(self, label: int) -> str:
    """Returns a class's name, or its number where that is not known."""
    return str(label) if self.class_names is None else self.class_names[label]

  def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
    """Returns for each image the k most probable classes, the first first.

    Args:
      k: at most C are given.

    Returns:
      N lists of a class's name and its probability.
    """
    probabilities = self.probabilities
    order = np.argsort(-probabilities, axis=-1, kind='stable')[:, :k]
    return [
      [(self.name_of(label), float(row[label])) for label in labels]
      for labels, row in zip(order, probabilities, strict=True)
    ]

  def __len__(self) -> int:
    return len(self.labels)

  def __repr__(self) -> str:
    lines = [f'{"class":24} {"probability":>11} {"bucket":>6} {"MAdds":>15}']
    first = zip(self.top(1), self.buckets, self.madds, strict=True)
    for i, ([(name, probability)], bucket, madds) in enumerate(first):
      if i == _MAX_LINES:
        lines.append(f'... {len(self) - i} more')
        break
      lines.append(f'{name:24} {probability:11.3f} {bucket:6} {madds:15,}')
    return '\n'.join(lines)


class Predictor:
  """`predictor(images)` routes every image to the bucket that will do.

  Images run in batches of a few sizes, powers of two. Each size compiles once,
  into one program that holds every branch. Threads may call it at the same
  time.

  Attributes:
    model: the network, weights included.
    preparation: how images are brought to what the network takes.
    class_names: of the labels; None where they are not known.
    router: which buckets run for an image; see `with_budget`.
    costs: multiply-adds of the trunk and of every bucket's branch.
    parts: the network, for those who route by themselves.
    weights: what `parts` takes.
  """

  def __init__(
    self,
    model,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float = 1.0,
    interpolation: str = 'bilinear',
    background: tuple[int, int, int] = (255, 255, 255),
    class_names: Sequence[str] | None = None,
    has_gate: bool = True,
    gate_target: routing.GateTarget | None = None,
    held_out: routing.Outcomes | None = None,
    presliced: bool = True,
  ):
    """Wraps a model; `restore` is the usual way here.

    Args:
      model: a supernet with trained weights.
      image_size: S, in pixels.
      mean: of the channels, in units of pixel / 255.
      std: of the channels, in units of pixel / 255.
      crop_ratio: share of the short side kept of images of another size.
      interpolation: `bilinear` or `bicubic`, how these are resized.
      background: R, G, B that is seen through what is transparent.
      class_names: of the labels.
      has_gate: whether the slimming head is trained.
      gate_target: what the gate was trained for; None means an SGS gate that
        spends what it was trained to.
      held_out: outcomes of images that no training has seen, which budgets are
        set on.
      presliced: whether every bucket gets a copy of its slices of the weights,
        for speed, of small batches above all. Without, all buckets share the
        weights and slice them in every call.
    """
    self.model = model
    self.preparation = images_lib.Preparation(
      image_size, crop_ratio, interpolation, tuple(background)
    )
    self.class_names = None if class_names is None else tuple(class_names)
    self._sizes = batching.Sizes()
    self._threads = concurrent.futures.ThreadPoolExecutor(
      os.cpu_count(), thread_name_prefix='ds_jax_decode'
    )
    # Workdir, step and presliced, where it was restored.
    self._source: tuple[str, int, bool] | None = None
    self._has_gate = has_gate
    self._gate_target = gate_target or routing.GateTarget()
    self._held_out = held_out
    self._variables = models.variables_of(model)
    self.costs = routing.BucketCosts.of_model(model, image_size)
    self.router = jax.device_put(
      routing.gate_at_target(held_out, self.costs, self._gate_target)
    )
    self._normalize = functools.partial(data.normalize, mean=mean, std=std)
    self.parts, self.weights = parts_lib.make_parts(
      model, self._normalize, image_size, presliced=presliced
    )
    # Those that are no bucket have no slices of their own.
    self._shared = parts_lib.SharedParts(model, self._normalize, image_size)
    options = compiler.options_for_inference(
      slices_weights=self.parts.slices_weights
    )
    self._route = jax.jit(
      functools.partial(_route, self.parts), compiler_options=options
    )
    self._run = jax.jit(
      _run, static_argnames=('parts', 'subnet'), compiler_options=options
    )
    self._pool = jax.jit(
      functools.partial(_pool, models.Architecture(model), self._normalize),
      static_argnames='subnet',
    )

  @classmethod
  def restore(
    cls, workdir: str, step: int | None = None, *, presliced: bool = True
  ) -> 'Predictor':
    """Restores a checkpoint of a run or a conversion.

    Args:
      workdir: that of `ds_jax.main`, or the output of `ds_jax.convert`.
      step: one of those in its `checkpoints/`; None means the newest intact.
      presliced: as in the constructor.

    Raises:
      CheckpointError: if there is no intact checkpoint.
    """
    directory = checkpoint.directory_of(workdir)
    restored = checkpoint.restore(directory, step)
    meta = restored.meta
    model = models.create_abstract_model(**meta['model'])
    predictor = cls(
      models.Architecture(model).bind(
        models.variables_from(restored.tree['network'])
      ),
      image_size=meta['image_size'],
      mean=meta['mean'],
      std=meta['std'],
      crop_ratio=meta['crop_ratio'],
      interpolation=meta['interpolation'],
      background=meta.get('background', (255, 255, 255)),
      class_names=meta.get('class_names'),
      has_gate=meta['has_gate'],
      gate_target=routing.GateTarget(**meta.get('gate_target', {})),
      held_out=routing.images_held_out(restored.tree),
      presliced=presliced,
    )
    predictor._source = str(paths.expanded(workdir)), restored.step, presliced
    return predictor

  def __copy__(self):
    """Returns one with the same weights and compiled programs."""
    other = object.__new__(type(self))
    other.__dict__.update(self.__dict__)
    return other

  def __reduce__(self):
    """Pickles as the checkpoint that it was restored from, and the router."""
    if self._source is None:
      raise TypeError(
        'This Predictor was not restored from a workdir, and pickles as no'
        ' more than where to restore from: use Predictor.restore, or save the'
        ' model with ds_jax.export.'
      )
    return _restored_with, (*self._source, jax.device_get(self.router))

  def with_budget(
    self,
    madds: float | None = None,
    *,
    fraction: float | None = None,
    router: str = 'gate',
    score: str = 'margin',
    ladder: Sequence[int] | None = None,
  ) -> 'Predictor':
    """Returns this predictor with another mean cost of an image.

    The budget holds on average over images like those held out, which it is
    set on. Nothing is trained, and nothing compiled but for another kind of
    router.

    Args:
      madds: mean multiply-adds an image.
      fraction: the same, as a share of the largest bucket's.
      router: `gate` chooses one bucket; `cascade` runs the buckets of a ladder
        until one is sure.
      score: what a cascade is sure by: `probability`, `margin`, `entropy` or
        `learned`.
      ladder: a cascade's buckets, indices of sub-networks, rising; None means
        the first and the last bucket.

    Raises:
      BudgetError: if the budget is out of the router's range.
      ValueError: unless either madds or fraction is given, for an unknown
        router, score or ladder, or if there are no images to set budgets on.
    """
    if (madds is None) == (fraction is None):
      raise ValueError(
        f'with_budget(madds={madds}, fraction={fraction}): expected one of the'
        ' two.'
      )
    validation.check_choice('router', router, ('gate', 'cascade'))
    if self._held_out is None:
      raise ValueError(
        'This checkpoint has no outcomes of held-out images to set a budget on:'
        ' train with config.dataset.budget_share, for example 0.05, to the end'
        ' of the run.'
      )
    if madds is None:
      madds = fraction * float(self.costs.buckets.max())
    if router == 'cascade':
      rungs = None if ladder is None else self._rungs(ladder)
      dial = routing.CascadeDial(self._held_out, self.costs, rungs, score)
    else:
      utility = self._gate_target.utility
      dial = routing.GateDial(self._held_out, self.costs, utility)
    # Shares the compiled programs.
    other = copy.copy(self)
    other.router = jax.device_put(dial.router(madds))
    return other

  def _rungs(self, ladder: Sequence[int]) -> list[int]:
    """Returns the places of these sub-networks among the buckets."""
    indices = self.costs.indices
    if not ladder or list(ladder) != [i for i in indices if i in ladder]:
      raise ValueError(
        f'ladder={tuple(ladder)}: expected one or more of the buckets'
        f' {tuple(indices)}, rising.'
      )
    return [indices.index(bucket) for bucket in ladder]

  @property
  def image_size(self) -> int:
    """S, the side of what the network takes, in pixels."""
    return self.preparation.image_size

  def __call__(self, images: Any, subnet: int | None = None) -> Prediction:
    """Classifies images.

    Args:
      images: (N, H, W, 3) or (N, H, W, 1) uint8; a path, a folder, the content
        of a file or an image of Pillow; or a list of any of these, arrays
        without N. Those of another size than `image_size` are brought to it as
        evaluation does.
      subnet: the index of the sub-network to run for every image, a bucket of
        the gate or not. None leaves it to the router.

    Returns:
      The prediction, on the host.

    Raises:
      ImageError: for a file that can't be read; it is a ValueError.
      OSError: for a path that does not exist.
      ValueError: for images of another kind, a `subnet` that does not exist,
        or a gate that is not trained yet.
    """
    if subnet is not None:
      chosen = self._sub_network(subnet)
      logits = self._in_batches(images, ('run', chosen), self.program(subnet))
      routed = routing.Routed(np.zeros((len(logits), 1), np.int32), logits)
      return prediction_of(routed, self._costs_alone(chosen), self.class_names)
    self._check_gate()
    kind = 'route', jax.tree.structure(self.router)
    routed = self._in_batches(images, kind, self.program())
    return prediction_of(routed, self.costs, self.class_names)

  def features(self, images: Any, subnet: int | None = None) -> np.ndarray:
    """Returns what the classifier reads, for a head or an index of one's own.

    Args:
      images: as in `__call__`.
      subnet: of which sub-network, by its index; None means the widest.

    Returns:
      (N, c) float32, the average over all places, or a ViT's class token.

    Raises:
      ValueError: as in `__call__`.
    """
    index = self.model.widest.index if subnet is None else subnet
    chosen = self._sub_network(index)
    pool = functools.partial(self._pool, self._variables, subnet=chosen)
    return self._in_batches(images, ('pool', chosen), pool)

  def _in_batches(self, images, kind, program):
    items = images_lib.listed(images)

    def prepare(some):
      return self.preparation.all(some, self._threads.map)

    def call(batch):
      return self._sizes.run(
        kind, len(batch), lambda: program(jax.device_put(batch))
      )

    sizes = self._sizes.plan(kind, len(items))
    return batching.run(items, sizes, prepare, call)

  def program(self, subnet: int | None = None) -> Callable[[jax.Array], Any]:
    """Returns the compiled part of a prediction, whose results stay on device.

    Args:
      subnet: as in `__call__`.

    Returns:
      A function of images (N, S, S, 3) uint8 to logits (N, C), or, of the
      router, to `routing.Routed`.
    """
    if subnet is None:
      return functools.partial(self._route, self._routed_weights(), self.router)
    chosen = self._sub_network(subnet)
    parts, weights = self._alone(chosen)
    return functools.partial(self._run, weights, parts=parts, subnet=chosen)

  def lowerable(
    self, platform: str, subnet: int | None = None
  ) -> tuple[Callable[..., routing.Routed], Any, routing.BucketCosts]:
    """Returns the prediction for another platform to compile.

    Args:
      platform: as JAX lowers for: `cpu`, `cuda`, `rocm` or `tpu`.
      subnet: as in `__call__`. One sub-network is routed to as if it were the
        only bucket.

    Returns:
      A function of some arguments and images, those arguments, and the costs
      of the buckets.

    Raises:
      ValueError: if the gate is needed and not trained yet, or for a `subnet`
        that does not exist.
    """

    def there(parts):
      return type(parts)(self.model, self._normalize, self.image_size, platform)

    if subnet is not None:
      chosen = self._sub_network(subnet)
      parts, weights = self._alone(chosen)
      run = functools.partial(_run_alone, parts=there(parts), subnet=chosen)
      return run, (weights,), self._costs_alone(chosen)
    self._check_gate()
    arguments = self._routed_weights(), self.router
    return functools.partial(_route, there(self.parts)), arguments, self.costs

  def _routed_weights(self):
    buckets = sorted({bucket for run in self.router.runs for bucket in run})
    indices = [self.costs.indices[bucket] for bucket in buckets]
    return self.parts.needed(self.weights, indices, gate=self.router.uses_gate)

  def _alone(self, chosen: models.Subnet) -> tuple[parts_lib.Parts, Any]:
    """Returns the parts that run a sub-network, and their weights."""
    if chosen in self.model.routing_space:
      return self.parts, self.parts.needed(self.weights, [chosen.index])
    return self._shared, self._variables

  def _costs_alone(self, chosen: models.Subnet) -> routing.BucketCosts:
    trunk, branch = self.model.cost_in_parts(chosen, self.image_size)
    branches = np.asarray([branch.madds], np.int64)
    return routing.BucketCosts(trunk.madds, branches, (chosen.index,))

  def _check_gate(self):
    if self.router.uses_gate and not self._has_gate:
      raise ValueError(
        'This checkpoint is from before the end of Stage II, or a conversion:'
        ' its gate is not trained. Choose a sub-network with predictor(images,'
        ' subnet=k), train on, or, if the converted weights have a trained'
        ' gate, convert them with --gate=trained.'
      )

  def _sub_network(self, index: int) -> models.Subnet:
    known = self.model.sub_networks
    if not 0 <= index < len(known):
      raise ValueError(
        f'subnet={index}: expected 0 (narrowest) to {len(known) - 1} (widest).'
      )
    return known[index]


def _restored_with(workdir, step, presliced, router) -> Predictor:
  predictor = Predictor.restore(workdir, step, presliced=presliced)
  predictor.router = jax.device_put(router)
  return predictor


def prediction_of(
  routed: routing.Routed,
  costs: routing.BucketCosts,
  class_names: tuple[str, ...] | None = None,
) -> Prediction:
  """Returns what images that went through a router are, all on the host."""
  last = routing.last_bucket(routed.runs, len(costs.branches))
  return Prediction(
    routed.logits,
    routed.logits.argmax(-1).astype(np.int32),
    np.asarray(costs.indices, np.int32)[last],
    costs.of_runs(routed.runs),
    class_names,
  )


def _route(parts, weights, router, images):
  return routing.route(router, parts.network(weights), images)


def _run_alone(weights, images, parts, subnet):
  runs = jnp.zeros((len(images), 1), jnp.int32)
  return routing.Routed(runs, parts.run(weights, images, subnet))


def _run(weights, images, parts, subnet):
  return parts.run(weights, images, subnet)


def _pool(architecture, normalize, variables, images, subnet):
  model = architecture.bind(variables)
  return model.pooled(model.trunk(normalize(images), subnet), subnet)
