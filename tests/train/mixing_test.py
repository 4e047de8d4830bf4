"""Tests of Mixup and CutMix against NumPy, and of steps with mixed batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import fixed
import micro
from ds_jax import config as config_lib
from ds_jax import models, parallel
from ds_jax.train import gate, losses, mixing, phases, supernet

SEED, SMOOTHING = 3, 0.1
NUM_IMAGES, SIZE = 8, 8
MIXUP = config_lib.DataConfig('digits', mixup_alpha=0.8)
CUTMIX = config_lib.DataConfig('digits', cutmix_alpha=1.0)
BOTH = config_lib.DataConfig('digits', mixup_alpha=0.8, cutmix_alpha=1.0)
OFF = config_lib.DataConfig('digits')
KINDS = (MIXUP, CUTMIX, BOTH)
OPTIMIZER = config_lib.OptimizerConfig(learning_rate=0.1)


def make_batch(seed=0, size=NUM_IMAGES):
  rng = np.random.default_rng(seed)
  shape = (2, size, SIZE, SIZE, 3)
  images, other = rng.integers(0, 256, shape).astype(np.uint8)
  labels = rng.integers(0, 3, size).astype(np.int32)
  return {'images': images, 'teacher_images': other, 'labels': labels}


@functools.partial(jax.jit, static_argnames=('config', 'num_classes'))
def mix(key, views, labels, config, num_classes):
  return mixing.mix(key, views, labels, config, num_classes)


def mixed_by_numpy(images, pixels):
  """The mixture for a share in each pixel, (H, W), in float64."""
  own = np.asarray(pixels, np.float64)[None, :, :, None]
  return own * images + (1 - own) * images[::-1]


def box_by_timm(share, row, column, height, width):
  """timm's `rand_bbox` without a margin: y from, to, x from, to."""
  ratio = np.sqrt(1 - share)
  cut_height, cut_width = int(height * ratio), int(width * ratio)
  return (
    np.clip(row - cut_height // 2, 0, height),
    np.clip(row + cut_height // 2, 0, height),
    np.clip(column - cut_width // 2, 0, width),
    np.clip(column + cut_width // 2, 0, width),
  )


class MixTest(parameterized.TestCase):
  """Rows with a label of their own each, which tells their share."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.images = rng.integers(0, 256, (6, 5, 7, 3)).astype(np.uint8)
    self.labels = np.asarray([2, 0, 5, 1, 4, 3], np.int32)

  def mix(self, seed, config, views=None):
    views = self.images if views is None else views
    key = jax.random.key(seed)
    found, labels = mix(key, views, self.labels, config, 6)
    return jax.tree.map(np.asarray, found), np.asarray(labels)

  def share_of(self, labels):
    """The share that all rows have, of labels that are checked."""
    share = labels[0, self.labels[0]]
    own, other = np.eye(6)[self.labels], np.eye(6)[self.labels[::-1]]
    expected = share * own + (1 - share) * other
    np.testing.assert_allclose(labels, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=0, atol=1e-6)
    assert labels.dtype == np.float32
    return share

  def test_mixup_equals_its_formula(self):
    shares = set()
    for seed in range(8):
      images, labels = self.mix(seed, MIXUP)
      share = self.share_of(labels)
      expected = mixed_by_numpy(self.images, np.full((5, 7), share))
      np.testing.assert_allclose(images, expected, rtol=0, atol=1e-3)
      shares.add(float(share))
    assert len(shares) == 8

  def test_cutmix_takes_a_box_from_the_partner_and_its_area_from_the_label(
    self,
  ):
    other = self.images[::-1]
    differs = (self.images != other).any(-1)
    areas, at_border = set(), 0
    for seed in range(40):
      images, labels = self.mix(seed, CUTMIX)
      kept = (images == self.images).all(-1)
      cut = (images == other).all(-1)
      assert (kept | cut).all()
      (rows, columns) = np.nonzero((cut & differs).any(0))
      area = 0
      if len(rows):
        box = np.s_[
          :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
        ]
        assert cut[box].all() and cut[0][box[1:]].size == len(rows)
        area = len(rows)
        at_border += rows.min() == 0 or columns.max() == 6
      # Of the pixels that were cut, not of the box before it was clipped.
      share = self.share_of(labels)
      np.testing.assert_allclose(share, 1 - area / 35, rtol=1e-6)
      areas.add(area)
    assert len(areas) > 5 and 0 < at_border < 40

  def test_boxes_are_timm_s_up_to_the_border(self):
    rng = np.random.default_rng(1)
    shares = np.concatenate([[0, 1], rng.random(2000)]).astype(np.float32)
    rows = rng.integers(0, 9, len(shares))
    columns = rng.integers(0, 14, len(shares))
    rows[:2], columns[:2] = 0, 13
    boxes = jax.vmap(lambda *c: jnp.stack(mixing.cut_box(*c, 9, 14)))(
      shares, rows, columns
    )
    expected = [
      box_by_timm(np.float32(share), row, column, 9, 14)
      for share, row, column in zip(shares, rows, columns, strict=True)
    ]
    np.testing.assert_array_equal(boxes, expected)
    # A box as large as the image, in a corner, is a quarter of it.
    np.testing.assert_array_equal(boxes[0], [0, 4, 6, 14])

  @parameterized.parameters(0.2, 0.8)
  def test_shares_are_beta_distributed(self, alpha):
    keys = jax.random.split(jax.random.key(0), 4000)
    config = config_lib.DataConfig('digits', mixup_alpha=alpha)
    draw = jax.jit(jax.vmap(lambda k: mixing.draw_shares(k, config, 2, 2)[1]))
    shares = np.asarray(draw(keys))
    variance = 1 / (4 * (2 * alpha + 1))
    # Five standard errors of a mean; of a variance, which are less.
    error = 5 * np.sqrt(variance / 4000)
    np.testing.assert_allclose(shares.mean(), 0.5, rtol=0, atol=error)
    np.testing.assert_allclose(shares.var(), variance, rtol=0.1)

  def test_a_batch_is_cut_mixed_or_left_alone_as_often_as_is_said(self):
    config = config_lib.DataConfig(
      'digits',
      mixup_alpha=1.0,
      cutmix_alpha=1.0,
      mix_probability=0.7,
      mix_switch_probability=0.25,
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda k: mixing.draw_shares(k, config, 32, 32)))
    pixels, shares = (np.asarray(x) for x in draw(keys))
    is_blend = ((pixels > 0) & (pixels < 1)).all((1, 2))
    is_left = (pixels == 1).all((1, 2))
    assert (shares[is_left] == 1).all()
    # Some boxes are empty: those of shares next to 1.
    for found, expected in ((is_blend, 0.7 * 0.75), (is_left, 0.3)):
      np.testing.assert_allclose(found.mean(), expected, rtol=0, atol=0.06)

  def test_a_batch_that_is_not_mixed_keeps_its_bits(self):
    config = config_lib.DataConfig(
      'digits', mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5
    )
    count = 0
    for seed in range(20):
      images, labels = self.mix(seed, config)
      if self.share_of(labels) == 1:
        count += 1
        np.testing.assert_array_equal(images, self.images)
        np.testing.assert_array_equal(labels, np.eye(6)[self.labels])
    assert 0 < count < 20

  @parameterized.parameters(*KINDS)
  def test_views_are_mixed_alike(self, config):
    views = {'one': self.images, 'other': self.images[:, ::-1] // 2}
    for seed in range(3):
      together, labels = self.mix(seed, config, views)
      for name, view in views.items():
        alone, same_labels = self.mix(seed, config, view)
        np.testing.assert_array_equal(together[name], alone)
        np.testing.assert_array_equal(labels, same_labels)

  @parameterized.parameters(*KINDS)
  def test_depends_on_the_key_alone(self, config):
    one, same, other = (self.mix(seed, config) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one[0] != other[0]).any() and (one[1] != other[1]).any()

  @parameterized.parameters('pjit', 'pmap')
  def test_devices_mix_the_global_batch(self, name):
    executor = parallel.Executor(config_lib.ParallelConfig(name))
    assert executor.mesh.size == 8
    batch = make_batch(size=24)

    def run(key, images, labels):
      return mixing.mix(key, images, labels, BOTH, 3, executor.reversed_rows)

    compiled = executor.compile(
      run, [parallel.WHOLE, *[parallel.BATCH] * 2], parallel.BATCH
    )
    laid_out = executor.put_batch(batch)
    for seed in range(6):  # of both kinds
      key = jax.random.key(seed)
      found = compiled(key, laid_out['images'], laid_out['labels'])
      expected = mix(key, batch['images'], batch['labels'], BOTH, 3)
      for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def normalize(images):
  return images.astype(jnp.float32) / 64 - 2


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits, targets):
  return -(targets * log_softmax(logits)).sum(-1).mean()


def smoothed(labels):
  return (1 - SMOOTHING) * np.asarray(labels, np.float64) + SMOOTHING / 3


# One block, without anything between narrowest and widest.
MODEL = models.create_abstract_model(
  'ds_mobilenet',
  3,
  stem_widths=(4,),
  stages=(dict(widths=(4, 6, 8)),),
  gate_stage=0,
)
ARCHITECTURE = models.Architecture(MODEL)


@functools.partial(jax.jit, static_argnames=('index', 'momentum'))
def logits_of(variables, images, index, momentum=None):
  """Of a sub-network, in `sub_networks`' order; 0.1 is training's."""
  model = ARCHITECTURE.bind(variables)
  return model(normalize(images), MODEL.sub_networks[index], momentum=momentum)


def make_phase(make, config, dataset, **options):
  return make(
    config,
    MODEL,
    normalize,
    num_steps=10,
    steps_per_epoch=10,
    seed=SEED,
    executor=parallel.Executor(devices=jax.devices()[:1]),
    dataset=dataset,
    **options,
  )


def step_key(step):
  return jax.random.fold_in(jax.random.key(SEED), step)


def stage_one(dataset, **options):
  config = config_lib.SupernetConfig(
    num_epochs=1,
    optimizer=OPTIMIZER,
    num_random=0,
    label_smoothing=SMOOTHING,
    **options,
  )
  return make_phase(supernet.Supernet, config, dataset)


def stage_two(dataset, **options):
  config = config_lib.GateConfig(
    num_epochs=1, optimizer=OPTIMIZER, label_smoothing=SMOOTHING, **options
  )
  return make_phase(gate.Gate, config, dataset, image_size=SIZE)


class StepsTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    batch = make_batch()
    variables = fixed.calibrated_variables(MODEL, normalize(batch['images']))
    # So that an image's label matters.
    kernel = 10 * variables.params['classifier/kernel']
    cls.variables = variables.replace(
      params={**variables.params, 'classifier/kernel': kernel}
    )

  def run_steps(self, phase, count=2, views=('images',)):
    """The state and the metrics before and after each step."""
    state, runs = phase.init(self.variables), []
    for step in range(count):
      batch = make_batch(step)
      batch = {k: v for k, v in batch.items() if k in (*views, 'labels')}
      before = jax.tree.map(np.array, state)
      state, metrics = phase.step(state, batch, step)
      runs.append((before, batch, {k: float(v) for k, v in metrics.items()}))
    return jax.tree.map(np.array, state), runs


class StageOneTest(StepsTestCase):
  @parameterized.parameters(MIXUP, CUTMIX)
  def test_losses_are_those_of_the_mixed_batch(self, dataset):
    phase = stage_one(dataset)
    _, runs = self.run_steps(phase)
    for step, (before, batch, metrics) in enumerate(runs):
      assert all(np.isfinite(value) for value in metrics.values())
      images, labels = mix(
        step_key(step), batch['images'], batch['labels'], dataset, 3
      )
      widest = len(MODEL.sub_networks) - 1
      logits = logits_of(before.variables, images, widest, momentum=0.1)
      np.testing.assert_allclose(
        metrics['loss/widest'],
        cross_entropy(logits, smoothed(labels)),
        rtol=1e-4,
      )
      # Not that of the labels as they were.
      plain = cross_entropy(logits, smoothed(np.eye(3)[batch['labels']]))
      assert abs(metrics['loss/widest'] - plain) > 1e-3
      right = np.asarray(logits).argmax(-1) == np.asarray(labels).argmax(-1)
      assert metrics['accuracy'] == right.mean()

  def test_teacher_and_students_see_the_same_mixture_of_their_views(self):
    phase = stage_one(BOTH, multi_view=True)
    views = ('images', 'teacher_images')
    _, runs = self.run_steps(phase, views=views)
    for step, (before, batch, metrics) in enumerate(runs):
      mixed, _ = mix(
        step_key(step),
        {name: batch[name] for name in views},
        batch['labels'],
        BOTH,
        3,
      )
      widest = len(MODEL.sub_networks) - 1
      targets = np.exp(
        log_softmax(logits_of(before.network, mixed['teacher_images'], widest))
      )
      logits = logits_of(before.variables, mixed['images'], 0, momentum=0.1)
      np.testing.assert_allclose(
        metrics['loss/0'], cross_entropy(logits, targets), rtol=1e-4
      )

  def test_micro_batches_are_mixed_each_in_itself_by_a_key_of_its_own(self):
    phase = stage_one(MIXUP, accumulation_steps=2)
    _, ((before, batch, metrics),) = self.run_steps(phase, count=1)
    widest, variables, found = len(MODEL.sub_networks) - 1, before.variables, []
    shares = set()
    for i in range(2):
      part = {k: np.split(v, 2)[i] for k, v in batch.items()}
      images, labels = mix(
        step_key(i), part['images'], part['labels'], MIXUP, 3
      )
      # Training's batch norms leave the running statistics out.
      logits = logits_of(variables, images, widest, momentum=0.1)
      found.append(cross_entropy(logits, smoothed(labels)))
      shares.add(np.asarray(labels).max(-1).min().item())
    np.testing.assert_allclose(
      metrics['loss/widest'], np.mean(found), rtol=1e-4
    )
    assert len(shares) == 2

  def test_what_is_off_changes_no_program_and_no_bit(self):
    never = config_lib.DataConfig('digits', cutmix_alpha=1, mix_probability=0)
    programs, runs = set(), []
    for dataset in (None, OFF, never):
      phase = stage_one(dataset)
      phase._mix = None  # is not called
      batch = phase.executor.put_batch(make_batch())
      programs.add(
        phase._widest_gradient.lower(
          self.variables,
          batch['images'],
          batch['labels'],
          jax.random.key(0),
          None,
        ).as_text()
      )
      if dataset is not never:
        runs.append(self.run_steps(phase))
    assert len(programs) == 1
    jax.tree.map(np.testing.assert_array_equal, *runs)


class StageTwoTest(StepsTestCase):
  def parts(self, network, images):
    """Every bucket's logits (K, N, C), and the gate's."""
    model = ARCHITECTURE.bind(network)
    answers = model.all_buckets(normalize(images))
    return jnp.stack(answers.logits), model.gate_logits(answers.features)

  @parameterized.parameters(MIXUP, CUTMIX)
  def test_losses_are_those_of_the_mixed_batch(self, dataset):
    phase = stage_two(dataset)
    _, runs = self.run_steps(phase)
    for step, (before, batch, metrics) in enumerate(runs):
      assert all(np.isfinite(value) for value in metrics.values())
      images, labels = mix(
        step_key(step), batch['images'], batch['labels'], dataset, 3
      )
      network = before.network.replace(
        params={**before.network.params, **before.head}
      )
      outputs, gate_logits = jax.jit(self.parts)(network, images)
      noise = jax.random.gumbel(step_key(step), gate_logits.shape)
      picked = np.asarray(gate_logits + noise).argmax(-1)
      routed = np.asarray(outputs)[picked, np.arange(NUM_IMAGES)]
      np.testing.assert_allclose(
        metrics['loss/routed'],
        cross_entropy(routed, smoothed(labels)),
        rtol=1e-4,
      )
      own = np.asarray(labels).argmax(-1)
      easy = np.asarray(outputs)[0].argmax(-1) == own
      assert metrics['easy'] == easy.mean()
      targets = smoothed(np.where(easy[:, None], [1, 0, 0], [0, 0, 1]))
      np.testing.assert_allclose(
        metrics['loss/sandwich'], cross_entropy(gate_logits, targets), rtol=1e-4
      )

  def test_correctness_is_that_of_the_label_with_the_larger_share(self):
    phase = stage_two(BOTH, target='correctness', target_madds=2.8e3)
    _, ((before, batch, metrics),) = self.run_steps(phase, count=1)
    images, labels = mix(step_key(0), batch['images'], batch['labels'], BOTH, 3)
    outputs, gate_logits = jax.jit(self.parts)(before.network, images)
    own = np.asarray(labels).argmax(-1)
    right = np.exp(log_softmax(outputs))[:, np.arange(NUM_IMAGES), own].T
    log = -np.log1p(np.exp(-np.asarray(gate_logits, np.float64)))
    other = -np.log1p(np.exp(np.asarray(gate_logits, np.float64)))
    expected = -(right * log + (1 - right) * other).mean()
    np.testing.assert_allclose(metrics['loss/correctness'], expected, rtol=1e-4)

  def test_images_that_are_not_augmented_are_not_mixed(self):
    plain, off, none = (
      stage_two(dataset, is_augmented=is_augmented)
      for dataset, is_augmented in ((BOTH, False), (OFF, True), (None, True))
    )
    batch = make_batch()
    programs = {
      phase._step.lower(
        phase.init(self.variables),
        batch['images'],
        batch['labels'],
        np.int32(0),
      ).as_text()
      for phase in (plain, off, none)
    }
    assert len(programs) == 1


class DominantTest(parameterized.TestCase):
  def test_is_the_label_itself_or_the_likelier(self):
    labels = jnp.asarray([2, 0, 1], jnp.int32)
    assert losses.dominant(labels) is labels
    mixed = jnp.asarray([[0.3, 0, 0.7], [0.6, 0.4, 0], [0, 0.5, 0.5]])
    found = losses.dominant(mixed)
    np.testing.assert_array_equal(found, [2, 0, 1])
    assert found.dtype == jnp.int32

  @parameterized.parameters(0.0, 0.1)
  def test_cross_entropy_smooths_each_of_two_labels(self, smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (7, 5)).astype(np.float32)
    one, other = rng.integers(0, 5, (2, 7))
    share = 0.3
    expected = share * losses.cross_entropy(logits, jnp.asarray(one), smoothing)
    expected += (1 - share) * losses.cross_entropy(
      logits, jnp.asarray(other), smoothing
    )
    mixed = share * np.eye(5)[one] + (1 - share) * np.eye(5)[other]
    found = losses.cross_entropy(
      logits, jnp.asarray(mixed, jnp.float32), smoothing
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('alpha', [0.0, 0.8])
def test_a_run_s_phases_mix_as_its_dataset_says(tmp_path, alpha):
  config = micro.get_config()
  config.dataset.name = micro.write_images(tmp_path)
  config.dataset.mixup_alpha = alpha
  config.gate.target_madds = 2.8e3
  experiment = config_lib.Experiment.from_config(config)
  executor = parallel.Executor(devices=jax.devices()[:1])
  first, _, second = phases.make_phases(experiment, MODEL, executor)
  mixes = experiment.dataset if alpha else None
  assert first._mixed_as == second._mixed_as == mixes
