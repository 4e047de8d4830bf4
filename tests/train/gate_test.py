"""Tests of Stage II: its update against float64 NumPy, and what it leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import fixed
from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import gate

SEED = 3
NUM_IMAGES, NUM_BUCKETS, REDUCED = 8, 3, 2
HEAD = 'stages/1/0/gate/slim/kernel'
TEMPERATURE = 0.7
SMOOTHING = 0.1


def create_model(**options):
  return models.create_abstract_model(
    'ds_mobilenet',
    3,
    stem_widths=(4, 6),
    stages=(dict(widths=(4, 8)), dict(widths=(4, 12, 24))),
    gate_stage=1,
    **options,
  )


def random_variables(model):
  """Weights that all matter: the gate's reduction is positive.

  With this seed the buckets disagree, and the gate does not send all images to
  the same one.
  """
  rng = np.random.default_rng(2)

  def fill(path, array):
    noise = rng.normal(0, 0.5, array.shape).astype(np.float32)
    if path.endswith('reduce/bias'):
      noise += 3
    positive = path.endswith(('scale', 'variance'))
    return jnp.asarray(np.exp(noise) if positive else noise)

  variables = models.variables_of(model)
  return models.Variables(
    {path: fill(path, array) for path, array in variables.params.items()},
    {path: fill(path, array) for path, array in variables.batch_stats.items()},
  )


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def make_batch():
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (NUM_IMAGES, 8, 8, 3)).astype(np.uint8)
  labels = rng.integers(0, 3, NUM_IMAGES).astype(np.int32)
  return {'images': images, 'labels': labels}


def make_phase(model, image_size=8, **config):
  config = config_lib.GateConfig(
    num_epochs=1,
    optimizer=config_lib.OptimizerConfig(learning_rate=1.0, momentum=0.0),
    **config,
  )
  return gate.Gate(
    config,
    model,
    normalize,
    image_size=image_size,
    num_steps=10,
    steps_per_epoch=10,
    seed=SEED,
    executor=parallel.Executor(devices=jax.devices()[:1]),
  )


def softmax(logits):
  logits = np.exp(logits - logits.max(-1, keepdims=True))
  return logits / logits.sum(-1, keepdims=True)


def cross_entropy(logits, labels, is_balanced=False):
  """With label smoothing."""
  log = np.log(softmax(logits))
  own = log[np.arange(len(labels)), labels]
  rows = -((1 - SMOOTHING) * own + SMOOTHING * log.mean(-1))
  if is_balanced:
    return np.mean([rows[labels == label].mean() for label in set(labels)])
  return rows.mean()


def binary_cross_entropy(logits, targets):
  """-t log(p) - (1 - t) log(1 - p), where p is the logits' sigmoid."""
  probability = 1 / (1 + np.exp(-logits))
  log, other = np.log(probability), np.log(1 - probability)
  return -(targets * log + (1 - targets) * other).mean()


def differences(function, x, step=1e-5):
  """Central differences, good to the square of the step."""
  gradient = np.zeros(x.shape)
  for index in np.ndindex(*x.shape):
    change = np.zeros(x.shape)
    change[index] = step
    gradient[index] = (function(x + change) - function(x - change)) / (2 * step)
  return gradient


class GateTestCase(parameterized.TestCase):
  """A phase, whose program is compiled once for a class."""

  config = {}
  options = {}

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_model(**cls.options)
    cls.variables = random_variables(cls.model)
    cls.batch = make_batch()
    cls.madds = np.asarray(
      [cls.model.cost(s, 8).madds for s in cls.model.routing_space], np.float64
    )
    cls.phase = make_phase(cls.model, **cls.config)

  def init(self, head=None):
    """The state, if need be with this slimming head."""
    params = dict(self.variables.params)
    if head is not None:
      params[HEAD] = jnp.asarray(head, jnp.float32)
    return self.phase.init(self.variables.replace(params=params))


class LossTestCase(GateTestCase):
  """The whole loss, written out anew."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    architecture = models.Architecture(cls.model)
    images = cls.batch['images']

    @jax.jit
    def frozen_parts(variables):
      model = architecture.bind(variables)
      features = model.trunk(normalize(images))
      space = model.routing_space
      return features, [model.branch(features, s) for s in space]

    features, outputs = frozen_parts(cls.variables)
    # z_k, (K, N, C).
    cls.outputs, cls.features = np.asarray(outputs, np.float64), features
    path = HEAD.removesuffix('slim/kernel') + 'reduce'
    params = {
      name: np.asarray(cls.variables.params[f'{path}/{name}'], np.float64)
      for name in ('kernel', 'bias')
    }
    pooled = np.asarray(features, np.float64).mean((1, 2))
    kernel = params['kernel'][: pooled.shape[-1]]
    cls.reduced = np.maximum(pooled @ kernel + params['bias'], 0)
    # Some images are easy, some dependent and some hard.
    first, last = cls.outputs[0].argmax(-1), cls.outputs[-1].argmax(-1)
    neither = np.where(first == last, (first + 1) % 3, 3 - first - last)
    labels = np.choose(np.arange(NUM_IMAGES) % 3, (first, last, neither))
    cls.batch['labels'] = labels.astype(np.int32)

  def mix(self, logits, step):
    """The relaxed sample of the step's noise."""
    key = jax.random.fold_in(jax.random.key(SEED), step)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return softmax((logits + np.asarray(noise, np.float64)) / TEMPERATURE)

  def sandwich_labels(self, hard):
    right = self.outputs.argmax(-1) == self.batch['labels']
    return np.where(right[0], 0, np.where(right[-1], NUM_BUCKETS - 1, hard))

  def sandwich(self, logits, targets):
    is_balanced = self.config.get('balances_labels', False)
    return cross_entropy(logits, targets, is_balanced)

  def check_step(self, hard, madds_term, state, step):
    """One step of SGD at learning rate 1 moves the head by the gradient."""
    head = np.asarray(state.head[HEAD], np.float64)
    start = self.mix(self.reduced @ head, step)
    one_hot = np.eye(NUM_BUCKETS)[start.argmax(-1)]
    targets, labels = self.sandwich_labels(hard), self.batch['labels']

    def routed(head):
      mix = one_hot + self.mix(self.reduced @ head, step) - start
      return mix, np.einsum('nk,knc->nc', mix, self.outputs)

    def loss(head):
      mix, logits = routed(head)
      total = 2 * self.sandwich(self.reduced @ head, targets)
      total += 3 * cross_entropy(logits, labels)
      return total + madds_term((mix @ self.madds).mean())

    gradient = differences(loss, head)
    new, metrics = self.phase.step(state, self.batch, step)
    found = head - np.asarray(new.head[HEAD])
    # Float32 against float64.
    atol = 1e-4 * np.abs(gradient).max()
    np.testing.assert_allclose(found, gradient, rtol=0, atol=atol)

    logits = self.reduced @ head
    expected = {
      'loss/sandwich': self.sandwich(logits, targets),
      'loss/routed': cross_entropy(routed(head)[1], labels),
      'madds': self.madds[logits.argmax(-1)].mean(),
      'easy': (targets == 0).mean(),
      'gradient_norm': np.sqrt((gradient**2).sum()),
      'parameter_norm': np.sqrt((np.asarray(new.head[HEAD]) ** 2).sum()),
      # A cosine over ten steps, from 1.
      'learning_rate': (1 + np.cos(np.pi * step / 10)) / 2,
      'price': new.price,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    return new, metrics


class SquaredMaddsTest(LossTestCase):
  """Without a target: c * (mean MAdds / unit)^2."""

  config = dict(
    sandwich_weight=2.0,
    routed_weight=3.0,
    madds_weight=0.25,
    madds_unit=5e3,
    temperature=TEMPERATURE,
    label_smoothing=SMOOTHING,
    ema_decay=0.6,
  )

  @parameterized.parameters(0, 1)
  def test_head_moves_by_the_gradient_of_the_stated_loss(self, step):
    def madds_term(spent):
      return 0.25 * (spent / 5e3) ** 2

    new, _ = self.check_step(NUM_BUCKETS - 1, madds_term, self.init(), step)
    assert new.price == 0

  def test_each_kind_of_image_is_there(self):
    right = self.outputs.argmax(-1) == self.batch['labels']
    assert right[0].any() and (~right[0] & ~right[-1]).any()
    assert (right[-1] & ~right[0]).any()

  def test_only_the_head_changes(self):
    state = self.init()
    for step in range(3):
      state, _ = self.phase.step(state, self.batch, step)
    for kind in ('params', 'batch_stats'):
      found, before = (
        getattr(v, kind) for v in (state.network, self.variables)
      )
      assert found.keys() == before.keys()
      for path, array in before.items():
        same = np.asarray(found[path]).tobytes() == np.asarray(array).tobytes()
        assert same == (path != HEAD), path
    assert state.head.keys() == {HEAD}

  # The decay is (1 + t) / (10 + t) while that is less than 0.6.
  @parameterized.parameters((0, 0.1), (5, 0.4), (50, 0.6))
  def test_network_holds_the_average_of_the_head(self, step, decay):
    state, _ = self.phase.step(self.init(), self.batch, 0)
    before, average = (
      np.asarray(a[HEAD]) for a in (state.head, state.network.params)
    )
    assert (before != average).all()
    state, _ = self.phase.step(state, self.batch, step)
    head = np.asarray(state.head[HEAD])
    expected = decay * average + (1 - decay) * head
    found = state.network.params[HEAD]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_steps_repeat_to_the_bit_and_keep_what_they_gave(self):
    runs = []
    for _ in range(2):
      state, all_metrics = self.init(), []
      for step in range(3):
        state, metrics = self.phase.step(state, self.batch, step)
        all_metrics.append(metrics)
      # States are donated; metrics and the caller's arrays are not.
      runs.append(jax.tree.map(np.array, (state, all_metrics, self.variables)))
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
      np.testing.assert_array_equal(one, other)


class TargetTest(LossTestCase):
  """With a target: price * mean MAdds / the widest bucket's."""

  TARGET, RATE, DAMPING = 4e3, 0.05, 2.0
  config = dict(
    sandwich_weight=2.0,
    routed_weight=3.0,
    target_madds=TARGET,
    price_rate=RATE,
    price_damping=DAMPING,
    hard_images='give_up',
    temperature=TEMPERATURE,
    label_smoothing=SMOOTHING,
  )

  @parameterized.parameters(0.0, 4.0, -3.0)
  def test_head_moves_by_the_gradient_of_the_stated_loss(self, price):
    state = self.init().replace(price=jnp.float32(price))
    logits = self.reduced @ np.asarray(state.head[HEAD], np.float64)
    argmax_madds = self.madds[logits.argmax(-1)].mean()
    damped = (
      price + self.DAMPING * (argmax_madds - self.TARGET) / self.madds[-1]
    )

    def madds_term(spent):
      return damped * spent / self.madds[-1]

    _, metrics = self.check_step(0, madds_term, state, 0)
    excess = (float(metrics['madds']) - self.TARGET) / self.madds[-1]
    expected = price + self.RATE * excess
    np.testing.assert_allclose(metrics['price'], expected, rtol=1e-5)

  @parameterized.parameters(0, NUM_BUCKETS - 1)
  def test_price_rises_where_too_much_is_spent_and_else_falls(self, bucket):
    assert self.madds[0] < self.TARGET < self.madds[-1]
    head = np.zeros((REDUCED, NUM_BUCKETS))
    head[:, bucket] = 10
    state, metrics = self.phase.step(self.init(head), self.batch, 0)
    # All images go to this bucket, whatever the noise.
    assert metrics['madds'] == self.madds[bucket]
    excess = (self.madds[bucket] - self.TARGET) / self.madds[-1]
    np.testing.assert_allclose(state.price, self.RATE * excess, rtol=1e-5)
    assert (state.price > 0) == (bucket > 0)


class BalancedTest(LossTestCase):
  """Both SGS labels weigh the same."""

  config = dict(
    sandwich_weight=2.0,
    routed_weight=3.0,
    madds_weight=0.25,
    madds_unit=5e3,
    hard_images='give_up',
    balances_labels=True,
    temperature=TEMPERATURE,
    label_smoothing=SMOOTHING,
  )

  def test_head_moves_by_the_gradient_of_the_stated_loss(self):
    # Five images of the one label and three of the other.
    assert sorted(self.sandwich_labels(0)) == [0] * 5 + [NUM_BUCKETS - 1] * 3
    self.check_step(0, lambda spent: 0.25 * (spent / 5e3) ** 2, self.init(), 0)


class NoisedSandwichTest(LossTestCase):
  """As the authors have it: softmaxed twice, with the noise between."""

  config = dict(
    sandwich_weight=2.0,
    routed_weight=3.0,
    madds_weight=0.25,
    madds_unit=5e3,
    noised_sandwich=True,
    temperature=TEMPERATURE,
    label_smoothing=SMOOTHING,
    ema_decay=0.6,
    ema_warmup=False,
  )

  def sandwich(self, logits, targets):
    return cross_entropy(self.mix(logits, step=0), targets)

  def test_head_moves_by_the_gradient_and_its_average_without_warm_up(self):
    before = np.asarray(self.init().head[HEAD])
    new, _ = self.check_step(
      NUM_BUCKETS - 1,
      lambda spent: 0.25 * (spent / 5e3) ** 2,
      self.init(),
      step=0,
    )
    expected = 0.6 * before + 0.4 * np.asarray(new.head[HEAD])
    np.testing.assert_allclose(
      new.network.params[HEAD], expected, rtol=1e-5, atol=1e-6
    )


class CorrectnessTestCase(LossTestCase):
  """mean BCE(gate logit k, softmax(z_k)[label])."""

  config = dict(target='correctness', target_madds=4e3, ema_decay=0.6)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    labels, images = cls.batch['labels'], np.arange(NUM_IMAGES)
    # (N, K).
    cls.targets = softmax(cls.outputs)[:, images, labels].T

  def check_step(self, state, loss_of):
    """One step at learning rate 1; `loss_of` is of the head, in float64."""
    head = {p: np.asarray(x, np.float64) for p, x in state.head.items()}
    gradient = {
      path: differences(lambda x, p=path: loss_of({**head, p: x}), array)
      for path, array in head.items()
    }
    new, metrics = self.phase.step(state, self.batch, 0)
    largest = max(np.abs(g).max() for g in gradient.values())
    assert new.head.keys() == gradient.keys()
    for path, expected in gradient.items():
      found = head[path] - np.asarray(new.head[path])
      # Float32 against float64.
      np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * largest, err_msg=path
      )
    first = self.outputs[0].argmax(-1) == self.batch['labels']
    total = {
      'gradient_norm': sum((g**2).sum() for g in gradient.values()),
      'parameter_norm': sum(
        (np.asarray(x, np.float64) ** 2).sum() for x in new.head.values()
      ),
    }
    expected = {
      'loss/correctness': loss_of(head),
      'easy': first.mean(),
      'learning_rate': 1,
      'price': new.price,
      **{name: np.sqrt(square) for name, square in total.items()},
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    return new


class CorrectnessTest(CorrectnessTestCase):
  """Of the published head, which is linear."""

  def loss(self, head):
    return binary_cross_entropy(self.reduced @ head[HEAD], self.targets)

  @parameterized.parameters(0.0, 1.0)
  def test_head_moves_by_the_gradient_of_the_stated_loss(self, scale):
    shape = (REDUCED, NUM_BUCKETS)
    head = scale * np.random.default_rng(4).normal(size=shape)
    new = self.check_step(self.init(head), self.loss)
    assert (np.asarray(new.head[HEAD]) != np.float32(head)).all()

  def test_price_is_left_alone_and_has_no_part_in_the_loss(self):
    heads = []
    for price in (0.0, 3.0):
      # A step donates its state.
      state = self.init().replace(price=jnp.float32(price))
      for step in range(2):
        state, metrics = self.phase.step(state, self.batch, step)
      assert state.price == metrics['price'] == price
      heads.append(np.asarray(state.head[HEAD]))
    np.testing.assert_array_equal(*heads)

  def test_logits_that_are_the_log_odds_have_no_gradient(self):
    # The loss is least where a logit's sigmoid is its target.
    odds = np.log(self.targets / (1 - self.targets))
    least = binary_cross_entropy(odds, self.targets)
    logits = jnp.asarray(odds, jnp.float32)
    outputs = jnp.asarray(self.outputs, jnp.float32)

    def loss(logits):
      return self.phase._correctness_loss(logits, outputs, self.batch['labels'])

    gradient, metrics = jax.grad(loss, has_aux=True)(logits)
    np.testing.assert_allclose(metrics['loss/correctness'], least, rtol=1e-5)
    # Float32's rounding of a probability, over the 24 logits.
    np.testing.assert_allclose(gradient, 0, atol=1e-6 / gradient.size)


class OwnHeadTest(CorrectnessTestCase):
  """Of a head with layers of its own, all of which are trained."""

  options = dict(gate_head='own', gate_hidden=(5, 4))

  def loss(self, head):
    variables = self.variables.replace(params={**self.variables.params, **head})
    logits = fixed.slimming_logits(self.features, variables)
    return binary_cross_entropy(logits, self.targets)

  def test_every_layer_moves_by_the_gradient_of_the_stated_loss(self):
    new = self.check_step(self.init(), self.loss)
    assert {path.split('/')[1] for path in new.head} == {
      'norm', 'hidden', 'head',
    }  # fmt: skip
    # The norm's statistics are calibration's, and stay.
    for path, array in self.variables.batch_stats.items():
      np.testing.assert_array_equal(new.network.batch_stats[path], array)


class LargeTest(parameterized.TestCase):
  def test_madds_beyond_32_bits_move_the_price_the_right_way(self):
    model, image_size = create_model(), 2**14
    madds = [model.cost(s, image_size).madds for s in model.routing_space]
    assert madds[0] > 2**31
    target = (madds[0] + madds[-1]) / 2
    phase = make_phase(model, image_size, target_madds=target, price_rate=1.0)
    for spent in madds:
      metrics = {'madds': jnp.float32(spent)}
      price = phase._next_price(jnp.float32(0), metrics, 0)
      expected = (spent - target) / madds[-1]
      np.testing.assert_allclose(price, expected, rtol=1e-4)


class BfloatTest(GateTestCase):
  config = dict(target_madds=4e3)
  options = dict(dtype='bfloat16')

  def test_losses_are_finite_and_arrays_stay_float32(self):
    state, metrics = self.phase.step(self.init(), self.batch, 0)
    assert all(np.isfinite(value) for value in metrics.values())
    arrays = jax.tree.leaves((state.network, state.head, state.price))
    assert {array.dtype for array in arrays} == {jnp.dtype('float32')}
    moved = np.asarray(state.head[HEAD]) != self.variables.params[HEAD]
    assert np.isfinite(state.head[HEAD]).all() and moved.all()


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      dict(target='both'),
      "target='both': expected 'sandwich' or 'correctness'",
    ),
    (dict(part='budget'), "part='budget': expected 'train' or 'gate'"),
  )
  def test_other_choices_are_refused(self, options, message):
    with pytest.raises(ValueError, match=message):
      make_phase(create_model(), **options)

  @parameterized.parameters(-1, 1)
  def test_target_out_of_reach_is_refused(self, side):
    model = create_model()
    ends = [model.cost(model.routing_space[i], 8).madds for i in (0, -1)]
    for end in ends:
      make_phase(model, target_madds=end)
    target = ends[0] - 1 if side < 0 else ends[1] + 1
    with pytest.raises(ValueError, match='out of reach: the buckets cost'):
      make_phase(model, target_madds=target)
