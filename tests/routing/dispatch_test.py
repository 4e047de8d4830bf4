"""Tiled dispatch against one `lax.switch` an image."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import ds_jax
import micro
from ds_jax.routing import dispatch

_NUM_BUCKETS = 3

# One program instead of one for each of its steps.
_plan_tiles = jax.jit(
  dispatch.plan_tiles, static_argnames=('num_buckets', 'tile_sizes')
)


def _buckets(kind: str, batch_size: int) -> np.ndarray:
  generator = np.random.default_rng(batch_size)
  choices = {
    'every bucket': np.arange(batch_size) % _NUM_BUCKETS,
    'one bucket': np.full(batch_size, 1),
    'an empty bucket': generator.choice([0, 2], batch_size),
    'uneven': generator.choice(3, batch_size, p=[0.8, 0.15, 0.05]),
    # The first image is skipped in a batch of any size.
    'some skipped': np.append(
      _NUM_BUCKETS, generator.choice(4, batch_size - 1, p=[0.3, 0.2, 0.1, 0.4])
    ),
    'all skipped': np.full(batch_size, _NUM_BUCKETS),
  }
  return choices[kind].astype(np.int32)


class TiledDispatchTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model = ds_jax.create_model(**micro.MODEL)
    cls.branches = [
      functools.partial(model.branch, subnet=s) for s in model.routing_space
    ]
    images = np.random.default_rng(0).normal(size=(64, 8, 8, 3))
    cls.features = np.asarray(model.trunk(jnp.asarray(images, jnp.float32)))

    @jax.jit
    def one(bucket, features):
      return jax.lax.switch(bucket, cls.branches, features)

    @functools.partial(jax.jit, static_argnames='tile_sizes')
    def tiled(buckets, features, tile_sizes):
      return dispatch.tiled_dispatch(
        buckets, cls.branches, features, tile_sizes
      )

    @jax.jit
    def images(buckets, features):
      return dispatch.dispatch_images(buckets, cls.branches, features)

    # Not class attributes as they are: those would bind `self`.
    cls.programs = {'one': one, 'tiled': tiled, 'images': images}

  def per_image(self, buckets, features):
    logits = np.zeros((len(buckets), 3), np.float32)
    for i, bucket in enumerate(buckets):
      if bucket < _NUM_BUCKETS:
        (logits[i],) = self.programs['one'](bucket, features[i : i + 1])
    return logits

  @parameterized.product(
    batch_size=(1, 7, 64),
    kind=(
      'every bucket',
      'one bucket',
      'an empty bucket',
      'uneven',
      'some skipped',
      'all skipped',
    ),
  )
  def test_tiled_dispatch_equals_per_image(self, batch_size, kind):
    buckets = _buckets(kind, batch_size)
    features = self.features[:batch_size]
    tiled = self.programs['tiled'](buckets, features, tile_sizes=(4,))
    # A convolution over 4 images adds up in another order than over 1.
    np.testing.assert_allclose(
      tiled, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters((1,), (3,), (8,), (64,), (4, 1), (8, 3), (8, 4, 2))
  def test_any_tile_sizes_give_the_same(self, *tile_sizes):
    buckets = _buckets('uneven', 20)
    features = self.features[:20]
    tiled = self.programs['tiled'](buckets, features, tile_sizes=tile_sizes)
    np.testing.assert_allclose(
      tiled, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )

  @parameterized.product(
    batch_size=(1, 20, 64), kind=('uneven', 'some skipped', 'all skipped')
  )
  def test_dispatch_images_picks_a_way_for_any_batch(self, batch_size, kind):
    buckets = _buckets(kind, batch_size)
    features = self.features[:batch_size]
    logits = self.programs['images'](buckets, features)
    np.testing.assert_allclose(
      logits, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )


_SIZES = ((1,), (4,), (16,), (8, 2), (8, 4), (8, 3), (16, 4, 1))


class TilePlanTest(parameterized.TestCase):
  """Plans against a layout by loops in Python."""

  @parameterized.product(
    batch_size=(1, 2, 7, 64),
    tile_sizes=_SIZES,
    # Of three buckets of four, and of images that run nothing.
    shares=(
      (0.6, 0.3, 0.1, 0.0),
      (0.4, 0.2, 0.1, 0.3),
      (0.1, 0.0, 0.0, 0.9),
      (0.0, 0.0, 0.0, 1.0),
      (1.0, 0.0, 0.0, 0.0),
    ),
  )
  def test_equals_a_layout_by_hand(self, batch_size, tile_sizes, shares):
    generator = np.random.default_rng(batch_size)
    buckets = generator.choice([0, 1, 3, 4], batch_size, p=shares)
    plan = jax.tree.map(
      np.asarray, _plan_tiles(jnp.asarray(buckets), 4, tile_sizes)
    )
    expected = _layout(buckets, 4, tile_sizes)
    for tiles, by_hand in zip(plan, expected, strict=True):
      used = len(by_hand)
      np.testing.assert_array_equal(
        tiles.buckets[:used], [bucket for bucket, _ in by_hand]
      )
      # What is left over is left to the empty branch.
      np.testing.assert_array_equal(tiles.buckets[used:], 4)
      for found, (_, images) in zip(tiles.images, by_hand, strict=False):
        np.testing.assert_array_equal(found[: len(images)], images)
      # Of one size there is no place twice.
      assert len(np.unique(tiles.images)) == tiles.images.size
    places = np.concatenate([tiles.images.reshape(-1) for tiles in plan])
    # Every image that runs has one place, and all other places are empty.
    np.testing.assert_array_equal(
      np.sort(places[places < batch_size]), np.flatnonzero(buckets < 4)
    )

  @parameterized.product(tile_sizes=_SIZES, num_buckets=(1, 3, 14))
  def test_any_buckets_fit_the_number_of_tiles(self, tile_sizes, num_buckets):
    generator = np.random.default_rng(num_buckets)
    for batch_size in (1, 5, 32, 64):
      plan = jax.eval_shape(
        lambda b: dispatch.plan_tiles(b, num_buckets, tile_sizes),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
      )
      most = [len(tiles.buckets) for tiles in plan]
      for _ in range(200):
        shares = generator.dirichlet(np.full(num_buckets, 0.3))
        buckets = generator.choice(num_buckets, batch_size, p=shares)
        used = map(len, _layout(buckets, num_buckets, tile_sizes))
        assert all(u <= m for u, m in zip(used, most, strict=True))

  @parameterized.parameters(
    (64, (4,), 4, (19,)),
    (1, (4,), 14, (1,)),
    (8, (4,), 1, (2,)),
    # Of two images of 8 that are left, one more large tile would be too many.
    (64, (8, 2), 4, (8, 12)),
    (64, (16, 4), 1, (4, 3)),
  )
  def test_number_of_tiles(self, batch_size, tile_sizes, num_buckets, expected):
    buckets = jnp.zeros(batch_size, jnp.int32)
    plan = _plan_tiles(buckets, num_buckets, tile_sizes)
    assert tuple(len(tiles.buckets) for tiles in plan) == expected

  @parameterized.parameters(
    (64, 4, (8, 2)),
    (256, 4, (32, 8)),
    (1, 4, (1,)),
    (3, 4, (2,)),
    (20, 4, (4,)),
    (64, 14, (4,)),
    (64, 1, (16, 4)),
  )
  def test_default_tile_sizes(self, batch_size, num_buckets, expected):
    assert dispatch.default_tile_sizes(batch_size, num_buckets) == expected

  @parameterized.parameters(
    (256, 4, (64, 32)),
    (64, 14, (16, 8)),
    (32, 4, (8,)),
    (20, 4, (8,)),
    (3, 4, (2,)),
    (1, 4, (1,)),
  )
  def test_default_tile_sizes_elsewhere(
    self, batch_size, num_buckets, expected
  ):
    with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
      assert dispatch.default_tile_sizes(batch_size, num_buckets) == expected


def _layout(buckets, num_buckets, tile_sizes):
  """Returns, for each size, a list of (bucket, its images) for each tile."""
  tiles = [[] for _ in tile_sizes]
  for bucket in range(num_buckets):
    images = np.flatnonzero(buckets == bucket).tolist()
    for i, size in enumerate(tile_sizes):
      is_last = i + 1 == len(tile_sizes)
      fewest = 1 if is_last else size - tile_sizes[i + 1] + 1
      while len(images) >= fewest:
        tiles[i].append((bucket, images[:size]))
        images = images[size:]
  return tiles


def test_a_tile_runs_one_branch_or_none():
  branches = [lambda x, k=k: x.sum((1, 2)) + k for k in range(3)]
  jaxpr = jax.make_jaxpr(
    lambda b, x: dispatch.tiled_dispatch(b, branches, x, (4,))
  )(jnp.zeros(20, jnp.int32), jnp.zeros((20, 2, 2, 5)))
  (scan,) = [e for e in jaxpr.eqns if e.primitive.name == 'scan']
  (cond,) = [e for e in scan.params['jaxpr'].eqns if e.primitive.name == 'cond']
  *running, empty = cond.params['branches']
  assert [len(b.eqns) > 0 for b in running] == [True] * 3
  assert 'reduce_sum' not in str(empty)
  assert all('reduce_sum' in str(b) for b in running)


class SkippedImagesTest(parameterized.TestCase):
  @parameterized.parameters(
    # Of buckets, and the branches that run: one a tile of four images.
    ([3], []),
    ([1], [1]),
    ([3] * 20, []),
    ([3] * 12 + [1] * 5 + [3] * 2 + [0], [0, 1, 1]),
  )
  def test_no_branch_runs_for_them(self, buckets, expected):
    ran = []

    def make_branch(bucket):
      def branch(x):
        jax.debug.callback(lambda _: ran.append(bucket), x[0, 0])
        return x + bucket + 1

      return branch

    branches = [make_branch(k) for k in range(3)]
    features = jnp.ones((len(buckets), 2))
    logits = jax.jit(lambda b, x: dispatch.dispatch_images(b, branches, x))(
      jnp.asarray(buckets), features
    )
    jax.effects_barrier()
    assert sorted(ran) == expected
    hand = [[0.0 if b == 3 else b + 2.0] * 2 for b in buckets]
    np.testing.assert_array_equal(logits, hand)


def test_skipped_images_get_zeros_where_no_tile_is_left_over():
  # Of 12 images, 1 + 2 + 2 tiles of four: all five that there are.
  buckets = jnp.asarray([2] * 5 + [3] + [1] * 5 + [0])
  plan = _plan_tiles(buckets, 3, (4,))
  (tiles,) = plan
  np.testing.assert_array_equal(tiles.buckets, [0, 1, 1, 2, 2])
  branches = [lambda x, k=k: x + k for k in range(3)]
  logits = jax.jit(lambda b, x: dispatch.tiled_dispatch(b, branches, x, (4,)))(
    buckets, jnp.ones((12, 2))
  )
  hand = np.repeat([3.0, 0.0, 2.0, 1.0], [5, 1, 5, 1])
  np.testing.assert_array_equal(logits, np.stack([hand, hand], axis=1))


def test_vmapped_switch_is_what_tiles_avoid():
  """Holds the claim of the module's docstring."""
  ran = jax.make_jaxpr(
    jax.vmap(lambda b, x: jax.lax.switch(b, [jnp.sin, jnp.cos], x))
  )(jnp.zeros(4, jnp.int32), jnp.zeros(4))
  assert 'select_n' in str(ran)
  assert 'cond' not in str(ran)
