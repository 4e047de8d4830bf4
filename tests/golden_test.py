"""Tests against numbers of the authors' PyTorch release, DS-Net at 15cd303.

`official_dsnet_tiny.npz` holds a tiny model's weights, 8 images of 32 pixels,
and what the release computes of them in float32 on CPU; no PyTorch is needed.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from ds_jax import config as config_lib
from ds_jax import convert, models, parallel
from ds_jax.train import losses, supernet

GOLDEN = dict(
  np.load(pathlib.Path(__file__).parent / 'official_dsnet_tiny.npz')
)
IMAGES = np.ascontiguousarray(GOLDEN['input_nchw'].transpose(0, 2, 3, 1))
NUM_BUCKETS = 4


def section(prefix):
  return {
    name.removeprefix(prefix): array
    for name, array in GOLDEN.items()
    if name.startswith(prefix)
  }


def create_model():
  return models.create_abstract_model(
    'ds_mobilenet',
    10,
    stem_widths=(8, 12),
    stages=(
      dict(widths=(8, 16), depth=1, stride=1),
      dict(widths=(16, 24), depth=1, stride=2),
      dict(widths=(16, 24), depth=1, stride=1),
      dict(widths=(16, 24, 32, 40), depth=2, stride=2),
      dict(widths=(24, 32, 40, 48), depth=1, stride=2),
    ),
    gate_stage=3,
  )


def converted(state):
  """The variables of a state in the release's names and layouts."""
  return models.variables_of(convert.from_official(state, create_model()))


def error(found, expected):
  """The largest difference, as a share of the largest magnitude."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


class GoldenTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = create_model()
    cls.variables = converted(section('state/'))
    cls.architecture = models.Architecture(cls.model)


class EvaluationTest(GoldenTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()

    @functools.partial(jax.jit, static_argnums=1)
    def run(variables, subnet):
      return cls.architecture.bind(variables)(IMAGES, subnet)

    @jax.jit
    def gate(variables):
      model = cls.architecture.bind(variables)
      return model.gate_logits(model.trunk(IMAGES))

    cls.bucket_logits = [
      np.asarray(run(cls.variables, s)) for s in cls.model.routing_space
    ]
    cls.widest_logits = np.asarray(run(cls.variables, cls.model.widest))
    cls.gate_logits = np.asarray(gate(cls.variables))

  def logits_of(self, name):
    if name == 'largest':
      return self.widest_logits
    return self.bucket_logits[0 if name == 'smallest' else int(name[-1])]

  # Float32 through 15 convolutions, summed in another order.
  @parameterized.parameters(
    'uniform_0', 'uniform_1', 'uniform_2', 'uniform_3', 'smallest', 'largest'
  )
  def test_logits(self, name):
    expected = GOLDEN[f'eval/{name}/logits']
    assert error(self.logits_of(name), expected) < 2e-5

  def test_gate_picks_the_same_buckets(self):
    np.testing.assert_array_equal(
      self.gate_logits.argmax(-1), GOLDEN['eval/dynamic/gate_index']
    )

  def test_gate_is_as_sure(self):
    found = jax.nn.softmax(jnp.asarray(self.gate_logits))
    assert error(found, GOLDEN['eval/dynamic/gate_probs']) < 2e-5

  def test_routed_logits(self):
    buckets = GOLDEN['eval/dynamic/gate_index']
    assert len(set(buckets.tolist())) > 1
    found = np.stack(self.bucket_logits)[buckets, np.arange(len(buckets))]
    assert error(found, GOLDEN['eval/dynamic/logits']) < 2e-5

  def test_madds_are_exact(self):
    space = self.model.routing_space
    subnets = (*space, self.model.narrowest, self.model.widest)
    assert [self.model.cost(s, 32).madds for s in subnets] == (
      GOLDEN['madds_uniform_smallest_largest'].tolist()
    )

  def test_sandwich_labels_are_exact(self):
    labels = GOLDEN['labels']
    correct = np.stack([z.argmax(-1) == labels for z in self.bucket_logits], 1)
    assert correct.shape == (len(labels), NUM_BUCKETS)
    found = losses.sandwich_labels(jnp.asarray(correct), 'try_best')
    np.testing.assert_array_equal(found, GOLDEN['sgs/targets'])

  def test_loss_of_the_routed_output(self):
    loss = losses.cross_entropy(
      GOLDEN['eval/dynamic/logits'], GOLDEN['labels'], label_smoothing=0.1
    )
    assert error(loss, GOLDEN['sgs/ce_loss']) < 1e-4

  def test_gate_loss_and_its_gradient(self):
    (path,) = (p for p in self.variables.params if 'slim' in p)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(head):
      params = {**self.variables.params, path: head}
      model = self.architecture.bind(self.variables.replace(params=params))
      logits = model.gate_logits(model.trunk(IMAGES))
      # The release feeds probabilities to a loss of logits; ours does not.
      return losses.cross_entropy(
        jax.nn.softmax(logits), GOLDEN['sgs/targets'], label_smoothing=0.1
      )

    loss, gradient = loss_and_gradient(self.variables.params[path])
    assert error(loss, GOLDEN['sgs/gate_loss']) < 1e-4
    expected = GOLDEN['sgs/grad_gate/gate_loss'][:, :, 0, 0].T
    assert error(gradient, expected) < 1e-4


class BootstrappingTest(GoldenTestCase):
  """One step of in-place bootstrapping: widest, 2, 1 and narrowest."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    executor = parallel.Executor(devices=jax.devices()[:1])
    config = config_lib.SupernetConfig(
      num_epochs=1,
      optimizer=config_lib.OptimizerConfig(),
      label_smoothing=0.1,
      momentum=0.1,
    )
    stage = supernet.Supernet(
      config,
      cls.model,
      lambda images: images,
      num_steps=1,
      steps_per_epoch=1,
      seed=0,
      executor=executor,
    )
    batch = {'images': IMAGES, 'labels': GOLDEN['labels']}
    space = cls.model.routing_space
    cls.gradient, cls.batch_stats, cls.metrics = stage.gradient(
      cls.variables,
      cls.variables,
      executor.put_batch(batch),
      [space[2], space[1]],
      jax.random.key(0),
    )

  @parameterized.parameters(
    ('largest', 'loss/widest'),
    ('uniform_2', 'loss/2'),
    ('uniform_1', 'loss/1'),
    ('smallest', 'loss/0'),
  )
  def test_loss(self, theirs, ours):
    assert error(self.metrics[ours], GOLDEN[f'ib/loss/{theirs}']) < 1e-4

  def test_gradient(self):
    # A gradient has its parameter's name and layout, so `from_official`, which
    # EvaluationTest holds to the release, also translates gradients. Arrays
    # without one, the slimming head's, get none.
    gradients = section('ib/grad/')
    state = section('state/')
    assert gradients.keys() <= state.keys()
    expected = converted(
      {name: gradients.get(name, 0 * array) for name, array in state.items()}
    ).params
    assert self.gradient.keys() == expected.keys()
    translated = 0
    for path, gradient in expected.items():
      if 'slim' in path:
        assert not np.asarray(self.gradient[path]).any()
        continue
      assert error(self.gradient[path], gradient) < 1e-3, path
      translated += 1
    assert translated == len(gradients)

  def test_running_statistics(self):
    after = section('ib/bn_after/')
    expected = converted({**section('state/'), **after}).batch_stats
    assert self.batch_stats.keys() == expected.keys()
    moved = 0
    for path, rows in expected.items():
      rows = np.array(rows)
      if len(rows) == NUM_BUCKETS + 1:
        # Theirs has one row for bucket 3 and for the widest; here the widest
        # alone ran, which is our last row.
        rows[3] = self.variables.batch_stats[path][3]
      for found, row, old in zip(
        self.batch_stats[path],
        rows,
        self.variables.batch_stats[path],
        strict=True,
      ):
        assert error(found, row) < 2e-5, path
        moved += (np.asarray(found) != old).any()
    # Rows 0 and 1 of the stem and the trunk; 0, 1, 2 and the widest's after.
    assert moved == 2 * (8 * 2 + 5 * 4)
