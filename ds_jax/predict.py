"""Routed inference from a checkpoint.

Axes: N images, H, W, K buckets, C classes.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ds_jax import (
  checkpoint,
  compiler,
  data,
  models,
  paths,
  routing,
  validation,
)
from ds_jax.models import hoist


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the network says of each image, and what that cost.

  Attributes:
    logits: (N, C) float32.
    labels: (N,) int32, the largest logit.
    buckets: (N,) int32, the index of the sub-network whose answer it is.
    madds: (N,) int64, multiply-adds spent, on all sub-networks that ran.
  """

  logits: np.ndarray
  labels: np.ndarray
  buckets: np.ndarray
  madds: np.ndarray


class Predictor:
  """`predictor(images)` routes every image to the bucket that will do.

  Each batch shape compiles once, into one program that holds every branch.

  Attributes:
    model: the network, weights included.
    image_size: what images are resized to.
    crop_ratio: share of the short side kept of images of another size.
    interpolation: how these are resized.
    router: which buckets run for an image; see `with_budget`.
    costs: multiply-adds of the trunk and of every bucket's branch.
    parts: the network, for those who route by themselves.
    weights: what `parts` runs on.
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
    has_gate: bool = True,
    gate: Mapping[str, Any] | None = None,
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
      has_gate: whether the slimming head is trained.
      gate: `target` and `target_madds` of the gate's config; None means an SGS
        gate that spends what it was trained to.
      held_out: outcomes of images that no training has seen, which budgets are
        set on.
      presliced: whether every bucket gets a copy of its slices of the weights,
        for speed: a sixth of the time of one image on a CPU. Without, all
        buckets share the weights and slice them in every call.
    """
    self.model = model
    self.image_size = image_size
    # Workdir, step and presliced, where it was restored.
    self._source: tuple[str, int, bool] | None = None
    self._has_gate = has_gate
    self.crop_ratio = crop_ratio
    self.interpolation = interpolation
    self._gate = gate or {'target': 'sandwich', 'target_madds': None}
    self._held_out = held_out
    self._variables = models.variables_of(model)
    self.costs = routing.BucketCosts.of_model(model, image_size)
    self.router = jax.device_put(
      routing.gate_at_target(held_out, self.costs, **self._gate)
    )
    self._normalize = functools.partial(data.normalize, mean=mean, std=std)
    self.parts = Parts(model, self._normalize, image_size)
    self.weights = (
      self.parts.prepare(self._variables) if presliced else self._variables
    )
    options = compiler.options_for_inference(
      slices_weights=isinstance(self.weights, models.Variables)
    )
    self._route = jax.jit(
      functools.partial(_route, self.parts), compiler_options=options
    )
    self._run = jax.jit(
      functools.partial(_run, self.parts),
      static_argnames='subnet',
      compiler_options=options,
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
      # Checkpoints from before it was kept.
      interpolation=meta.get('interpolation', 'bilinear'),
      has_gate=meta['stage'] in ('gate', 'budget')
      or meta.get('has_gate', False),
      gate=meta.get('gate'),
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
      fraction: the same, as a share of the dearest bucket's.
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
      utility = routing.utility_of(self._gate['target'])
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

  def __call__(
    self, images: np.ndarray, subnet: int | None = None
  ) -> Prediction:
    """Classifies a batch.

    Args:
      images: (N, H, W, 3) or (N, H, W, 1) uint8, or a list of (H, W, 3) or
        (H, W, 1), of any sizes. Those of another size than `image_size` are
        brought to it as evaluation does.
      subnet: the index of the sub-network to run for every image, a bucket of
        the gate or not. None leaves it to the router.

    Returns:
      The prediction, on the host.

    Raises:
      ValueError: for images of another kind, a `subnet` that does not exist,
        or a gate that is not trained yet.
    """
    images = prepare_images(
      images, self.image_size, self.crop_ratio, self.interpolation
    )
    if subnet is not None:
      return self._run_one(images, subnet)
    self._check_gate()
    routed = jax.device_get(self.program()(jax.device_put(images)))
    return prediction_of(routed, self.costs)

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
    return functools.partial(
      self._run, self._weights_alone(chosen), subnet=chosen
    )

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
    parts = Parts(self.model, self._normalize, self.image_size, platform)
    if subnet is not None:
      chosen = self._sub_network(subnet)
      run = functools.partial(_run_alone, parts, subnet=chosen)
      return run, (self._weights_alone(chosen),), self._costs_alone(chosen)
    self._check_gate()
    arguments = self._routed_weights(), self.router
    return functools.partial(_route, parts), arguments, self.costs

  def _routed_weights(self):
    buckets = sorted({bucket for run in self.router.runs for bucket in run})
    indices = [self.costs.indices[bucket] for bucket in buckets]
    return self._weights_of(indices, gate=self.router.uses_gate)

  def _weights_of(self, indices, gate=False):
    """Those that are needed: each array takes time in a call, used or not."""
    if isinstance(self.weights, models.Variables):
      return self.weights
    names = ['trunk', *(['gate'] if gate else []), *map(str, indices)]
    return {name: self.weights[name] for name in names}

  def _weights_alone(self, chosen: models.Subnet):
    # Those that are no bucket have no slices of their own.
    if chosen in self.model.routing_space:
      return self._weights_of([chosen.index])
    return self._variables

  def _costs_alone(self, chosen: models.Subnet) -> routing.BucketCosts:
    trunk, branch = self.model.cost_in_parts(chosen, self.image_size)
    branches = np.asarray([branch.madds], np.int64)
    return routing.BucketCosts(trunk.madds, branches, (chosen.index,))

  def _run_one(self, images, subnet) -> Prediction:
    run = self.program(subnet)
    logits = jax.device_get(run(jax.device_put(images)))
    only = np.zeros((len(images), 1), np.int32)
    costs = self._costs_alone(self._sub_network(subnet))
    return prediction_of(routing.Routed(only, logits), costs)

  def _check_gate(self):
    if self.router.uses_gate and not self._has_gate:
      raise ValueError(
        'This checkpoint is from before Stage II, or a conversion: its gate is'
        ' not trained. Choose a sub-network with predictor(images, subnet=k),'
        ' train on, or, if the converted weights have a trained gate, convert'
        ' them with --gate=trained.'
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


def prepare_images(
  images: np.ndarray | Sequence[np.ndarray],
  image_size: int,
  crop_ratio: float,
  interpolation: str,
) -> np.ndarray:
  """Returns images as the network takes them, (N, S, S, 3) uint8.

  Args:
    images: (N, H, W, 3) or (N, H, W, 1) uint8, or a list of such without N.
    image_size: S, that images of another size are brought to.
    crop_ratio: share of their short side that is kept.
    interpolation: as of `data.for_evaluation`.

  Raises:
    ValueError: for images of another kind, or none.
  """
  if not isinstance(images, (list, tuple)):
    images = np.asarray(images)
    _check_images(images.shape, images.dtype, 4)
  if not len(images):
    raise ValueError('There are no images; expected one or more.')
  expected = (len(images), image_size, image_size, 3)
  if isinstance(images, np.ndarray) and images.shape == expected:
    return images
  prepared = np.empty(expected, np.uint8)
  for i, image in enumerate(images):
    image = np.asarray(image)
    _check_images(image.shape, image.dtype, 3)
    if image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=-1)
    prepared[i] = data.for_evaluation(
      image, image_size, crop_ratio, interpolation
    )
  return prepared


def _check_images(shape, dtype, num_axes) -> None:
  """Raises ValueError unless these are images, (N,) H, W, and 1 or 3 channels.

  Those of a list have no N.
  """
  if len(shape) == num_axes and shape[-1] in (1, 3) and dtype == np.uint8:
    return
  if dtype != np.uint8:
    advice = 'give pixels as they are in a file, before any scaling'
  elif len(shape) == num_axes - 1 and shape[-1] in (1, 3):
    advice = 'add the batch axis to a single image with image[None]'
  elif len(shape) == num_axes - 1:
    advice = 'add the channel axis to grey images with images[..., None]'
  else:
    advice = 'channels come last'
  batch = '(N, ' if num_axes == 4 else '('
  raise ValueError(
    f'Images of shape {shape} and dtype {dtype}: expected {batch}H, W, 3) or'
    f' {batch}H, W, 1), uint8 in 0 .. 255; {advice}.'
  )


def prediction_of(
  routed: routing.Routed, costs: routing.BucketCosts
) -> Prediction:
  """Returns what images that went through a router are, all on the host."""
  last = routing.last_bucket(routed.runs, len(costs.branches))
  return Prediction(
    routed.logits,
    routed.logits.argmax(-1).astype(np.int32),
    np.asarray(costs.indices, np.int32)[last],
    costs.of_runs(routed.runs),
  )


class Parts:
  """Trunk, gate and branches by name, each a function of weights and an input.

  The weights are the network's own, or what `prepare` made of them.
  """

  def __init__(
    self, model, normalize, image_size: int, platform: str | None = None
  ):
    self._architecture = models.Architecture(model)
    self._variables = jax.eval_shape(lambda: models.variables_of(model))
    self._normalize = normalize
    self._image_size = image_size
    self._chunk_size = _chunk_size(
      image_size, platform or jax.default_backend()
    )
    # Not in what is written for later: it runs on few machines.
    self._fuses_attention = platform is None
    self._splits: dict[Any, hoist.Split] = {}
    self.branches = {str(s.index): s for s in model.routing_space}

  def prepare(self, variables: models.Variables):
    """Returns every part's weights, sliced; see `hoist.split`.

    Where this JAX does not allow it, the weights as they are, with a warning.
    """
    size = self._image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    run = functools.partial(self._run, 'trunk')
    features = jax.eval_shape(run, self._variables, images)
    try:
      splits = {
        part: self._split(part, images if part == 'trunk' else features)
        for part in ('trunk', 'gate', *self.branches)
      }
    except hoist.HoistError as error:
      logging.warning('Weights are sliced in every call: %s', error)
      return variables

    def prepare(variables):
      return {part: split.prepare(variables) for part, split in splits.items()}

    formats = None
    if jax.default_backend() == 'gpu':
      made = jax.eval_shape(prepare, variables)
      devices = jax.tree.leaves(variables)[0].devices()
      # Weights on several devices stay as they are.
      if len(devices) == 1:
        formats = jax.tree.map(lambda x: _gpu_format(x.ndim, *devices), made)
    return jax.jit(prepare, out_shardings=formats)(variables)

  def __call__(self, part: str, weights, x: jax.Array) -> jax.Array:
    """Runs a part on weights of either kind."""

    def run(x):
      if isinstance(weights, models.Variables):
        return self._run(part, weights, x)
      return self._split(part, x).run(weights[part], x)

    return run(x) if part == 'gate' else _in_chunks(run, x, self._chunk_size)

  def whole(self, variables, images, subnet: models.Subnet) -> jax.Array:
    """Runs a sub-network, trunk included, on the network's own weights."""
    model = self._bind(variables)
    return _in_chunks(
      lambda x: model(self._normalize(x), subnet), images, self._chunk_size
    )

  def _split(self, part, x):
    # Kept, since tracing is most of a start with compiled programs at hand.
    key = part, x.shape, x.dtype
    if key not in self._splits:
      run = functools.partial(self._run, part)
      self._splits[key] = hoist.split(run, self._variables, x)
    return self._splits[key]

  def _bind(self, variables):
    model = self._architecture.bind(variables)
    model.set_attributes(
      fused_attention=self._fuses_attention, raise_if_not_found=False
    )
    return model

  def _run(self, part, variables, x):
    model = self._bind(variables)
    with jax.named_scope(
      part if part in ('trunk', 'gate') else f'bucket_{part}'
    ):
      if part == 'trunk':
        return model.trunk(self._normalize(x))
      if part == 'gate':
        return model.gate_logits(x)
      return model.branch(x, self.branches[part])


def _gpu_format(num_axes: int, device: jax.Device) -> Any:
  """How a prepared array lies in memory; None leaves it to XLA.

  cuDNN reads a convolution's kernel (k, k, I, O) with the outputs first, and
  would be given a transposed copy in every call.
  """
  axes = (3, 0, 1, 2) if num_axes == 4 else tuple(range(num_axes))
  try:
    # Imported here: it is experimental, and of use to GPUs alone.
    from jax.experimental import layout

    return layout.Format(
      layout.Layout(axes), jax.sharding.SingleDeviceSharding(device)
    )
  except (AttributeError, ImportError, TypeError) as error:
    logging.log_first_n(
      logging.WARNING, 'Kernels are not laid out for cuDNN: %s', 1, error
    )
    return None


# Pixels of images that run at a time on CPU. The activations of more leave the
# caches: DS-MobileNet at 224 pixels takes 1.7 times as long for each of 64
# images as for each of 8.
_CPU_PIXELS = 8 * 224**2


def _chunk_size(image_size: int, platform: str) -> int | None:
  """Returns how many images to run at a time; None means any number."""
  if platform != 'cpu':
    return None
  largest = max(1, _CPU_PIXELS // image_size**2)
  return 1 << (largest.bit_length() - 1)


def _in_chunks(run, x, size):
  """Runs (N, ...), so many at a time."""
  if size is None or len(x) <= size:
    return run(x)
  rest = len(x) % size
  whole = x[: len(x) - rest].reshape(-1, size, *x.shape[1:])
  results = jax.lax.map(run, whole)
  results = results.reshape(-1, *results.shape[2:])
  if not rest:
    return results
  return jnp.concatenate([results, run(x[len(x) - rest :])])


def _route(parts, weights, router, images):
  features = parts('trunk', weights, images)
  branches = [
    functools.partial(parts, branch, weights) for branch in parts.branches
  ]
  if router.uses_gate:
    gate_logits = parts('gate', weights, features)
  else:
    gate_logits = jnp.zeros((len(features), router.num_buckets))
  return routing.route(router, branches, gate_logits, features)


def _run_alone(parts, weights, images, subnet):
  runs = jnp.zeros((len(images), 1), jnp.int32)
  return routing.Routed(runs, _run(parts, weights, images, subnet))


def _run(parts, weights, images, subnet):
  if isinstance(weights, models.Variables):
    return parts.whole(weights, images, subnet)
  features = parts('trunk', weights, images)
  return parts(str(subnet.index), weights, features)
