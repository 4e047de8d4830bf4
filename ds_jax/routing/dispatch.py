"""Each image through its own branch, on device, with static shapes.

`jax.lax.switch` under `vmap` becomes a select and runs every branch for every
image. Here one image takes a plain switch, and a batch is sorted by bucket and
cut into tiles of one bucket each: a scan over the tiles runs one branch a tile.

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
  tile_size = default_tile_size(len(features), len(branches))
  return tiled_dispatch(buckets, branches, features, tile_size)


def default_tile_size(batch_size: int, num_buckets: int) -> int:
  """Returns a power of two: a sixteenth of the batch for four buckets.

  Small tiles use the machine badly, large ones are padded more. Fewer than
  four images a tile are left to small batches alone, since the tiles that many
  buckets leave over cost nothing.
  """
  largest = max(min(4, batch_size), batch_size // (4 * num_buckets))
  return 1 << (largest.bit_length() - 1)


def tiled_dispatch(
  buckets: jax.Array,
  branches: Sequence[Branch],
  features: jax.Array,
  tile_size: int,
) -> jax.Array:
  """`dispatch_images` by tiles of `tile_size` images of one bucket.

  Every bucket's last tile may be part full; its empty places compute an image
  that is there and drop the result. The number of tiles is static, and the
  tiles that a batch leaves over run an empty branch.
  """
  plan = plan_tiles(buckets, len(branches), tile_size)
  tile = jax.ShapeDtypeStruct((tile_size, *features.shape[1:]), features.dtype)
  everything = [*branches, _empty_branch(branches[0], tile)]

  def run_tile(_, tile):
    bucket, images = tile
    return (), jax.lax.switch(bucket, everything, features[images])

  _, tiles = jax.lax.scan(run_tile, (), (plan.tile_buckets, plan.tile_images))
  logits = tiles.reshape(-1, tiles.shape[-1])[plan.image_slots]
  return jnp.where((buckets < len(branches))[:, None], logits, 0)


def _empty_branch(branch: Branch, features) -> Branch:
  """Zeros, of the shape that the branch gives for such features."""
  logits = jax.eval_shape(branch, features)
  return lambda _: jnp.zeros(logits.shape, logits.dtype)


class TilePlan(NamedTuple):
  """Which images run where.

  Attributes:
    tile_buckets: (tiles,) the branch of each tile; K for a tile left over.
    tile_images: (tiles, T) indices of images.
    image_slots: (N,) where in the tiles, laid end to end, an image's result
      is; of an image that runs nothing, any place.
  """

  tile_buckets: jax.Array
  tile_images: jax.Array
  image_slots: jax.Array


def plan_tiles(
  buckets: jax.Array, num_buckets: int, tile_size: int
) -> TilePlan:
  """Sorts images by bucket and lays them out in tiles.

  A bucket of n images takes ceil(n / T) tiles, so all together take at most
  ceil(N / T) + K - 1, and never more than N. Bucket K takes none.
  """
  batch_size = len(buckets)
  num_tiles = min(batch_size, -(-batch_size // tile_size) + num_buckets - 1)
  counts = jnp.bincount(buckets, length=num_buckets)
  tiles_end = jnp.cumsum(-(-counts // tile_size))
  images_end = jnp.cumsum(counts)

  order = jnp.argsort(buckets, stable=True)
  bucket = buckets[order]
  tiles_start = jnp.concatenate([jnp.zeros(1, tiles_end.dtype), tiles_end])
  images_start = jnp.concatenate([jnp.zeros(1, images_end.dtype), images_end])
  place = jnp.arange(batch_size) - images_start[bucket]
  slots = tiles_start[bucket] * tile_size + place

  tile_images = jnp.zeros(num_tiles * tile_size, jnp.int32)
  # Bucket K's images come last, on tiles left over or past them.
  tile_images = tile_images.at[slots].set(order.astype(jnp.int32), mode='drop')
  slots = jnp.minimum(slots, num_tiles * tile_size - 1)
  return TilePlan(
    (jnp.arange(num_tiles)[:, None] >= tiles_end[None]).sum(-1),
    tile_images.reshape(-1, tile_size),
    jnp.zeros(batch_size, slots.dtype).at[order].set(slots),
  )
