"""Each image through its own branch, on device, with static shapes.

`jax.lax.switch` under `vmap` becomes a select and runs every branch for every
image. Here one image takes a plain switch, and a batch is sorted by bucket and
cut into tiles of one bucket each: a scan over the tiles runs one branch a tile.
Large tiles make good use of a machine, and small ones take what is left of a
bucket without many empty places, so a batch that is large enough has both.

Axes: N batch, K buckets, T images a tile.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Branch = Callable[[jax.Array], jax.Array]


def dispatch_images(
  buckets: jax.Array, branches: Sequence[Branch], features: jax.Array
) -> jax.Array:
  """Runs branch `buckets[i]` on `features[i]`.

  Args:
    buckets: (N,) int32 in [0, K]; K runs nothing, at no cost.
    branches: K functions, each from features (n, ...) to logits (n, C), n
      static but any; each compiles by itself.
    features: (N, ...).

  Returns:
    Logits (N, C), in the order of the images; zeros where nothing ran.
  """
  if len(features) == 1:
    everything = [*branches, _empty_branch(branches[0], features)]
    return jax.lax.switch(buckets[0], everything, features)
  sizes = default_tile_sizes(len(features), len(branches))
  return tiled_dispatch(buckets, branches, features, sizes)


def default_tile_sizes(batch_size: int, num_buckets: int) -> tuple[int, ...]:
  """Returns one or two powers of two, falling: 8 and 2 for 64 images, K = 4.

  On CPU a bucket is to have two large tiles on average, and the batch at least
  four. Fewer than four images a tile are left to small batches alone, since the
  tiles that many buckets leave over cost nothing. A second size compiles every
  branch once more.

  Elsewhere a batch is to have few tiles, since on a GPU each takes a time of
  its own, as long as that of dozens of images: of a quarter and an eighth of
  the batch from 64 images on, and of eight images for fewer.
  """
  if jax.default_backend() != 'cpu':
    large = 1 << (max(batch_size // 4, min(8, batch_size)).bit_length() - 1)
    return (large, large // 2) if large > 8 else (large,)
  large = min(batch_size // (2 * num_buckets), batch_size // 4)
  large = 1 << (max(large, min(4, batch_size)).bit_length() - 1)
  return (large, large // 4) if large > 4 else (large,)


def tiled_dispatch(
  buckets: jax.Array,
  branches: Sequence[Branch],
  features: jax.Array,
  tile_sizes: Sequence[int],
) -> jax.Array:
  """`dispatch_images` by tiles of images of one bucket.

  A tile may be part full; its empty places compute an image that is there and
  drop the result. The number of tiles is static, and the tiles that a batch
  leaves over run an empty branch.

  Args:
    buckets: (N,) int32 in [0, K].
    branches: K functions from features (T, ...) to logits (T, C).
    features: (N, ...).
    tile_sizes: as of `plan_tiles`.

  Returns:
    As of `dispatch_images`.
  """
  result = jax.eval_shape(branches[0], _tile_of(features, tile_sizes[0]))
  logits = jnp.zeros((len(features), *result.shape[1:]), result.dtype)
  for tiles in plan_tiles(buckets, len(branches), tile_sizes):
    logits = _run_tiles(tiles, branches, features, logits)
  return logits


def _run_tiles(tiles, branches, features, logits):
  """Returns logits (N, C) with the results of these tiles."""
  tile = _tile_of(features, tiles.images.shape[1])
  everything = [*branches, _empty_branch(branches[0], tile)]

  def run_tile(logits, tile):
    bucket, images = tile
    there = features.at[images].get(mode='clip')
    results = jax.lax.switch(bucket, everything, there)
    logits = logits.at[images].set(results, mode='drop', unique_indices=True)
    return logits, ()

  return jax.lax.scan(run_tile, logits, tiles)[0]


def _tile_of(features, size):
  return jax.ShapeDtypeStruct((size, *features.shape[1:]), features.dtype)


def _empty_branch(branch: Branch, features) -> Branch:
  """Zeros, of the shape that the branch gives for such features."""
  logits = jax.eval_shape(branch, features)
  return lambda _: jnp.zeros(logits.shape, logits.dtype)


class Tiles(NamedTuple):
  """Tiles of one size.

  Attributes:
    buckets: (tiles,) the branch of each; K for one left over.
    images: (tiles, T) indices of images, none twice; of an empty place, some
      number from N on.
  """

  buckets: jax.Array
  images: jax.Array


class _Waiting(NamedTuple):
  """Images, sorted by bucket, some of which have no tile yet.

  Attributes:
    images: (N,) indices.
    buckets: (N,) in [0, K].
    places: (N,) among those of the bucket that wait; below 0 with a tile.
    counts: (K,) how many wait; below 0 with empty places in a tile.
    most: static, how many of one bucket may wait.
  """

  images: jax.Array
  buckets: jax.Array
  places: jax.Array
  counts: jax.Array
  most: int


def plan_tiles(
  buckets: jax.Array, num_buckets: int, tile_sizes: Sequence[int]
) -> list[Tiles]:
  """Sorts images by bucket and lays them out in tiles, of each size.

  Args:
    buckets: (N,) int32 in [0, K]; K takes no tile.
    num_buckets: K.
    tile_sizes: falling. A bucket's images fill tiles of one size while they
      leave fewer places of a tile empty than the next size has, and go on to
      that; the last size takes all that are left.
  """
  counts = jnp.bincount(buckets, length=num_buckets)
  order = jnp.argsort(buckets, stable=True)
  places = jnp.arange(len(order)) - _starts(counts)[buckets[order]]
  waiting = _Waiting(order, buckets[order], places, counts, len(order))
  plan = []
  for size, rest in zip(
    tile_sizes, [*tile_sizes[1:], tile_sizes[-1]], strict=True
  ):
    tiles, waiting = _plan_size(waiting, size, rest)
    plan.append(tiles)
  return plan


def _plan_size(
  waiting: _Waiting, size: int, rest: int
) -> tuple[Tiles, _Waiting]:
  """Fills tiles of one size; fewer than `rest` places of one stay empty."""
  batch_size, num_buckets = len(waiting.images), len(waiting.counts)
  # Of one bucket, and of all.
  most_tiles = (waiting.most + rest - 1) // size
  num_tiles = min(
    batch_size,
    num_buckets * most_tiles,
    (batch_size + num_buckets * (rest - 1)) // size,
  )
  tiles = jnp.maximum(waiting.counts + rest - 1, 0) // size
  places = jnp.append(tiles * size, 0)[waiting.buckets]
  is_here = (waiting.places >= 0) & (waiting.places < places)
  slots = _starts(tiles)[waiting.buckets] * size + waiting.places
  images = jnp.arange(batch_size, batch_size + num_tiles * size)
  images = images.at[jnp.where(is_here, slots, len(images))].set(
    waiting.images, mode='drop'
  )
  ends = jnp.cumsum(tiles)
  here = Tiles(
    (jnp.arange(num_tiles)[:, None] >= ends[None]).sum(-1),
    images.reshape(-1, size),
  )
  return here, waiting._replace(
    places=waiting.places - places,
    counts=waiting.counts - tiles * size,
    most=min(waiting.most, size - rest),
  )


def _starts(counts: jax.Array) -> jax.Array:
  """Returns (K + 1,): where each of K groups, and what follows them, begins."""
  ends = jnp.cumsum(counts)
  return jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
