"""Tiled dispatch against one `lax.switch` an image."""

import functools

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
  dispatch.plan_tiles, static_argnames=('num_buckets', 'tile_size')
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

    @functools.partial(jax.jit, static_argnames='tile_size')
    def tiled(buckets, features, tile_size):
      return dispatch.tiled_dispatch(buckets, cls.branches, features, tile_size)

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
    tiled = self.programs['tiled'](buckets, features, tile_size=4)
    # A convolution over 4 images adds up in another order than over 1.
    np.testing.assert_allclose(
      tiled, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(1, 3, 8, 64)
  def test_any_tile_size_gives_the_same(self, tile_size):
    buckets = _buckets('uneven', 20)
    features = self.features[:20]
    tiled = self.programs['tiled'](buckets, features, tile_size=tile_size)
    np.testing.assert_allclose(
      tiled, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )

  @parameterized.product(
    batch_size=(1, 20), kind=('uneven', 'some skipped', 'all skipped')
  )
  def test_dispatch_images_picks_a_way_for_any_batch(self, batch_size, kind):
    buckets = _buckets(kind, batch_size)
    features = self.features[:batch_size]
    logits = self.programs['images'](buckets, features)
    np.testing.assert_allclose(
      logits, self.per_image(buckets, features), rtol=1e-5, atol=1e-6
    )


class TilePlanTest(parameterized.TestCase):
  @parameterized.product(
    batch_size=(1, 2, 7, 64), tile_size=(1, 4, 16), seed=(0, 1, 2)
  )
  def test_every_image_has_one_place_in_a_tile_of_its_bucket(
    self, batch_size, tile_size, seed
  ):
    generator = np.random.default_rng(seed)
    buckets = generator.choice(4, batch_size, p=[0.6, 0.3, 0.1, 0.0])
    plan = _plan_tiles(jnp.asarray(buckets), 4, tile_size)
    slots = np.asarray(plan.image_slots)
    assert len(set(slots)) == batch_size
    places = np.asarray(plan.tile_images).reshape(-1)
    np.testing.assert_array_equal(places[slots], np.arange(batch_size))
    tile_buckets = np.asarray(plan.tile_buckets)
    np.testing.assert_array_equal(tile_buckets[slots // tile_size], buckets)
    # Tiles with no image are left to the empty branch, and only those.
    used = np.zeros(len(tile_buckets), bool)
    used[slots // tile_size] = True
    np.testing.assert_array_equal(tile_buckets == 4, ~used)

  @parameterized.product(
    batch_size=(1, 2, 7, 64),
    tile_size=(1, 4, 16),
    share_skipped=(0.3, 0.9, 1.0),
  )
  def test_skipped_images_take_no_tile_and_displace_no_other(
    self, batch_size, tile_size, share_skipped
  ):
    generator = np.random.default_rng(batch_size)
    buckets = generator.choice(4, batch_size, p=[0.5, 0.3, 0.2, 0.0])
    skipped = generator.random(batch_size) < share_skipped
    buckets[skipped] = 4
    plan = jax.tree.map(
      np.asarray, _plan_tiles(jnp.asarray(buckets), 4, tile_size)
    )
    used = [-(-np.sum(buckets == k) // tile_size) for k in range(4)]
    np.testing.assert_array_equal(
      plan.tile_buckets,
      np.repeat(range(5), [*used, len(plan.tile_buckets) - sum(used)]),
    )
    slots = plan.image_slots[~skipped]
    assert len(set(slots)) == len(slots)
    np.testing.assert_array_equal(
      plan.tile_images.reshape(-1)[slots], np.flatnonzero(~skipped)
    )
    np.testing.assert_array_equal(
      plan.tile_buckets[slots // tile_size], buckets[~skipped]
    )
    # Results are gathered for all images, so no place may be out of range.
    assert np.all(plan.image_slots < plan.tile_images.size)

  @parameterized.parameters((64, 4, 4, 19), (1, 4, 14, 1), (8, 4, 1, 2))
  def test_number_of_tiles(self, batch_size, tile_size, num_buckets, expected):
    plan = _plan_tiles(jnp.zeros(batch_size, jnp.int32), num_buckets, tile_size)
    assert len(plan.tile_buckets) == expected

  @parameterized.parameters(
    (64, 4, 4), (256, 4, 16), (1, 4, 1), (3, 4, 2), (64, 14, 4)
  )
  def test_default_tile_size(self, batch_size, num_buckets, expected):
    assert dispatch.default_tile_size(batch_size, num_buckets) == expected


def test_a_tile_runs_one_branch_or_none():
  branches = [lambda x, k=k: x.sum((1, 2)) + k for k in range(3)]
  jaxpr = jax.make_jaxpr(
    lambda b, x: dispatch.tiled_dispatch(b, branches, x, 4)
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
  plan = _plan_tiles(buckets, 3, 4)
  np.testing.assert_array_equal(plan.tile_buckets, [0, 1, 1, 2, 2])
  assert np.all(plan.image_slots < 20)
  branches = [lambda x, k=k: x + k for k in range(3)]
  logits = jax.jit(lambda b, x: dispatch.tiled_dispatch(b, branches, x, 4))(
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
