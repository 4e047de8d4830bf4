"""Times sub-networks, the switch, dispatch and memory of a model.

Axes: N batch, K buckets.
"""

import copy
import functools
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds_jax import compiler, inference, models, routing
from ds_jax.benchmark import timing
from ds_jax.nn import conv

# Of the images, for a narrow, two middle and a wide bucket.
SHARES = (0.5, 0.25, 0.15, 0.10)


class Subject:
  """A model in both forms of the Predictor."""

  def __init__(
    self, model, image_size: int, buckets: Sequence[int] | None = None
  ):
    self.model = model
    self.image_size = image_size
    make = functools.partial(
      inference.Predictor,
      model,
      image_size=image_size,
      mean=(0.5,) * 3,
      std=(0.25,) * 3,
    )
    self.shared = make(presliced=False)
    self.own = make(presliced=True)
    every = tuple(s.index for s in model.routing_space)
    self.buckets = every if buckets is None else sorted(set(buckets))
    if not self.buckets or not set(self.buckets) <= set(every):
      raise ValueError(f'buckets={tuple(buckets)}: expected some of {every}.')

  def images(self, batch_size: int) -> jax.Array:
    """Returns random uint8 images on the device."""
    shape = (batch_size, self.image_size, self.image_size, 3)
    return jax.device_put(
      np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    )

  def madds(self, bucket: int) -> int:
    """Of one image in this bucket, trunk included."""
    return self.model.cost(
      self.model.sub_networks[bucket], self.image_size
    ).madds

  def routed_to(self, bucket: int) -> inference.Predictor:
    """Returns a predictor whose gate sends everything to one bucket."""
    indices = np.asarray(self.own.costs.indices)
    offsets = np.where(indices == bucket, 1e9, 0)
    forced = copy.copy(self.own)
    forced.router = routing.gate_router(offsets)
    return forced


def subnet_ways(
  subject: Subject, batch_sizes: Sequence[int]
) -> list[timing.Way]:
  """Every bucket: slicing in the call, with its own weights, in the switch."""
  ways = []
  for batch_size in batch_sizes:
    images = subject.images(batch_size)
    for bucket in subject.buckets:
      forms = {
        'sliced': subject.shared.program(bucket),
        'own weights': subject.own.program(bucket),
      }
      if batch_size == 1:
        forms['switch'] = subject.routed_to(bucket).program()
      for form, program in forms.items():
        ways.append(
          timing.Way(
            'sub-networks',
            f'bucket {bucket}, {form}',
            batch_size,
            subject.madds(bucket),
            functools.partial(program, images),
            f'bucket {subject.buckets[-1]}, {form}',
          )
        )
  return ways


def subnet_ratios(
  subject: Subject, rows: Sequence[timing.Row], matmul_rate: float
) -> tuple[dict, dict]:
  """Returns the bars of the sub-networks, and what they are medians of."""
  slicing = {
    f'{bucket}/{batch_size}': ratio
    for bucket in subject.buckets
    for batch_size, ratio in timing.ratio(
      rows, f'bucket {bucket}, sliced', f'bucket {bucket}, own weights'
    ).items()
  }
  switch = {
    str(bucket): ratio
    for bucket in subject.buckets
    for ratio in timing.ratio(
      rows, f'bucket {bucket}, switch', f'bucket {bucket}, own weights'
    ).values()
  }
  share = {
    f'{row.name.split(",")[0].removeprefix("bucket ")}/{row.batch_size}': (
      row.madds_per_second / matmul_rate
    )
    for row in rows
    if row.name.endswith('own weights')
  }
  ratios = {
    'sliced_over_standalone': statistics.median(slicing.values()),
    'matmul_share': share,
  }
  if switch:
    ratios['switch_over_static'] = statistics.median(switch.values())
  return ratios, {'sliced_over_standalone': slicing, 'switch': switch}


def dispatch_ways(subject: Subject, batch_size: int) -> list[timing.Way]:
  """Ways to run branches, on features, for buckets of the given shares."""
  model, size = subject.model, subject.image_size
  parts, weights = subject.own.parts, subject.own.weights
  chosen = spread_out(subject.own.costs.indices, len(SHARES))
  counts = _counts(batch_size, SHARES[: len(chosen)])
  grouped = np.repeat(np.arange(len(chosen)), counts)
  buckets = np.random.default_rng(0).permutation(grouped).astype(np.int32)
  cost = [
    model.cost_in_parts(model.sub_networks[b], size)[1].madds for b in chosen
  ]
  mean = float(np.dot(counts, cost)) / batch_size
  images = subject.images(batch_size)

  names = [str(bucket) for bucket in chosen]
  places = [subject.own.costs.indices.index(bucket) for bucket in chosen]

  def branches_of(weights):
    branches = parts.network(weights).branches
    return [branches[place] for place in places]

  def trunk(weights, images):
    return parts.network(weights).trunk(images)

  def gate(weights, features):
    return parts.network(weights).gate_logits(features)

  def tiled(weights, features, buckets):
    return routing.dispatch_images(buckets, branches_of(weights), features)

  def oracle(weights, features):
    ends = np.cumsum(counts)
    return jnp.concatenate(
      [
        branch(features[end - count : end])
        for branch, count, end in zip(
          branches_of(weights), counts, ends, strict=True
        )
        if count
      ]
    )

  def widest(weights, features):
    return branches_of(weights)[-1](features)

  def vmapped(weights, features, buckets):
    branches = branches_of(weights)

    def run(bucket, x):
      return jax.lax.switch(bucket, branches, x[None])[0]

    return jax.vmap(run)(buckets, features)

  def overhead(_, features, buckets):
    # Reads every feature, and computes next to nothing.
    trivial = [
      lambda x: jnp.broadcast_to(
        x.reshape(len(x), -1).sum(-1, keepdims=True),
        (len(x), model.num_classes),
      )
    ] * len(chosen)
    return routing.dispatch_images(buckets, trivial, features)

  features = jax.jit(trunk)(weights, images)
  options = compiler.options_for_inference()
  trunk_madds = model.cost_in_parts(model.narrowest, size)[0].madds
  programs = {
    'trunk': (trunk, ['trunk'], (images,), trunk_madds),
    'gate': (gate, ['gate'], (features,), 0),
    'dispatch alone': (overhead, [], (features, buckets), 0),
    'tiled': (tiled, names, (features, buckets), mean),
    'oracle, grouped': (oracle, names, (features,), mean),
    'all widest': (widest, names[-1:], (features,), cost[-1]),
    'vmapped switch': (vmapped, names, (features, buckets), mean),
  }
  return [
    timing.Way(
      'dispatch',
      name,
      batch_size,
      madds,
      functools.partial(
        jax.jit(function, compiler_options=options),
        # Every argument takes time, used or not.
        {part: weights[part] for part in needed},
        *arguments,
      ),
      'all widest' if name in ('tiled', 'oracle, grouped') else None,
    )
    for name, (function, needed, arguments, madds) in programs.items()
  ]


def dispatch_ratios(rows: Sequence[timing.Row]) -> dict[str, float]:
  """Returns the bars of dispatch, of the largest batch."""
  by_name = {row.name: row for row in rows}
  tiled, widest = by_name['tiled'], by_name['all widest']
  return {
    'tiled_over_oracle': tiled.median / by_name['oracle, grouped'].median,
    'vmapped_over_tiled': by_name['vmapped switch'].median / tiled.median,
    'realised': (widest.median / tiled.median) / (widest.madds / tiled.madds),
  }


def memory(subject: Subject, batch_size: int) -> dict[str, float]:
  """Returns bytes of compiled programs: arguments, results and temporaries."""
  images = subject.images(batch_size)
  largest = subject.own.costs.indices[-1]
  programs = {
    'routed': subject.shared.program(),
    'largest bucket': subject.shared.program(largest),
    'routed, own weights': subject.own.program(),
  }
  return {name: _bytes(p, images) for name, p in programs.items()}


def depthwise_ways(subject: Subject) -> list[timing.Way]:
  """The model's depthwise convolutions of one image, in both forms."""
  if not isinstance(subject.model, models.MobileNet):
    return []
  ways = []
  options = compiler.options_for_inference()
  side = conv.output_size(subject.image_size, 2)
  for spec in subject.model.specs[1:]:
    side = conv.output_size(side, spec.stride)
    x = jnp.ones((1, side, side, spec.widths[-1]))
    kernel = jnp.ones((spec.kernels[-1],) * 2 + (1, spec.widths[-1]))
    for form in (conv.native_depthwise_conv, conv.shifted_depthwise_conv):
      program = jax.jit(
        form, static_argnames='stride', compiler_options=options
      )
      name = f'{form.__name__.split("_")[0]}, {side} x {side} x {x.shape[-1]}'
      call = functools.partial(program, x, kernel, stride=1)
      ways.append(timing.Way('depthwise', name, 1, 0, call))
  return ways


def depthwise_ratios(rows: Sequence[timing.Row]) -> dict[str, float]:
  """Returns the native form's time over that of the shifted one."""
  pairs = zip(rows[::2], rows[1::2], strict=True)
  ratios = [native.median / shifted.median for native, shifted in pairs]
  return {'native_over_shifted_depthwise': statistics.median(ratios)}


def spread_out(buckets: Sequence[int], count: int) -> list[int]:
  """Returns so many buckets, the first, the last, and some between them."""
  places = np.linspace(0, len(buckets) - 1, count).round().astype(int)
  return [buckets[place] for place in sorted(set(places.tolist()))]


def _counts(batch_size, shares) -> list[int]:
  ends = np.round(np.cumsum(shares) / sum(shares) * batch_size).astype(int)
  return np.diff(ends, prepend=0).tolist()


def _bytes(program, images) -> float:
  lowered = program.func.lower(*program.args, images, **program.keywords)
  stats = lowered.compile().memory_analysis()
  return float(
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    - stats.alias_size_in_bytes
  )
