"""Tests of checkpoints: exact, kept, and never wrong when damaged."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import checkpoint

# When one array fails to read, Orbax closes its event loop while TensorStore is
# still reading the others; these then find it closed, in threads of their own.
pytestmark = pytest.mark.filterwarnings(
  'ignore:(?s)Exception ignored in. None.*Event loop is closed'
  ':pytest.PytestUnraisableExceptionWarning'
)

META = {'phase': 'supernet', 'step_in_phase': 7, 'config': {'lr': 0.1}}


def make_tree(seed):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(40, 30)).astype(np.float32)
  return {
    'params': {
      'stages/3/0/pointwise/kernel': kernel,
      'stages': {'3': {'bias': kernel[0, ::2]}},
      'half': kernel[:4].astype(jnp.bfloat16),
    },
    'opt_state': {'0': {}, '1': {'count': np.array(seed, np.int32)}},
    'key': np.array([0, seed], np.uint32),
  }


def assert_same_tree(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, leaf in jax.tree_util.tree_leaves_with_path(found):
    other = expected
    for entry in path:
      other = other[entry.key]
    assert type(leaf) is np.ndarray
    assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape), path
    assert leaf.tobytes() == np.asarray(other).tobytes(), path


def data_files(step_dir):
  return sorted(p for p in pathlib.Path(step_dir).rglob('*') if p.is_file())


def snapshot(directory):
  paths = [directory, *sorted(directory.rglob('*'))]
  return [(str(path), path.stat().st_mtime_ns) for path in paths]


def run_python(code, *args, device_count=1):
  flag = f'--xla_force_host_platform_device_count={device_count}'
  environment = {**os.environ, 'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
  root = str(pathlib.Path(checkpoint.__file__).parents[1])
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    env={**environment, 'PYTHONPATH': root},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


@contextlib.contextmanager
def mounted_memory(directory, options):
  """A disk of its own, where the machine lets us have one."""
  mount = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', directory]
  done = subprocess.run(mount, capture_output=True, text=True, check=False)
  if done.returncode:
    pytest.skip(f'Mounting needs privileges: {done.stderr.strip()}')
  try:
    yield
  finally:
    subprocess.run(['umount', '--lazy', directory], check=True)


class CheckpointTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)

  def save_steps(self, *steps, **options):
    with checkpoint.Checkpointer(self.directory, **options) as checkpointer:
      for step in steps:
        checkpointer.save(step, make_tree(step), {**META, 'global_step': step})

  def step_names(self):
    return sorted(path.name for path in self.directory.iterdir())

  def restore_latest(self):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      return checkpointer.restore_latest()

  def assert_is_step(self, restored, step):
    assert restored.step == step
    assert restored.meta == {**META, 'global_step': step}
    assert_same_tree(restored.tree, make_tree(step))


class RoundTripTest(CheckpointTestCase):
  @parameterized.named_parameters(
    ('float32', np.arange(6, dtype=np.float32).reshape(2, 3)),
    ('float32_nan', np.array([np.nan, -0.0, np.inf], np.float32)),
    ('bfloat16', np.array([1.5, -2.25], jnp.bfloat16)),
    ('float16', np.array([1.5, -2.25], np.float16)),
    ('float8', np.array([1.5, -2], jnp.float8_e4m3fn)),
    ('int32_scalar', np.array(-7, np.int32)),
    ('numpy_scalar', np.int32(-7)),
    ('uint32_key', np.array([1, 2**32 - 1], np.uint32)),
    ('uint8', np.arange(256, dtype=np.uint8)),
    ('bool_scalar', np.array(True)),
    ('transposed', np.arange(6, dtype=np.float32).reshape(2, 3).T),
    ('reversed', np.arange(6, dtype=np.int32)[::-1]),
  )
  def test_leaf_comes_back_bit_for_bit(self, leaf):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(3, {'numpy': leaf, 'jax': jnp.asarray(leaf)}, META)
      restored = checkpointer.restore_latest()
    assert (restored.step, restored.meta) == (3, META)
    assert_same_tree(restored.tree, {'numpy': leaf, 'jax': leaf})

  @parameterized.named_parameters(
    ('slash', lambda x: {'a/b': x(0), 'a': {'b': x(1), '/': x(2)}, 'a/': x(3)}),
    ('digits', lambda x: {'0': {'0': x(0), '1': x(1)}, '1': x(2)}),
    ('dots', lambda x: {'a.b': x(0), '..': x(1), '../c': x(2)}),
    ('empty_dicts', lambda x: {'a': {}, 'b': {'c': {}, 'd': x(0)}}),
    ('odd_names', lambda x: {'': x(0), '%2F': x(1), 'ü "': x(2)}),
  )
  def test_structure_comes_back_exactly(self, build):
    tree = build(lambda value: np.array([value, value + 1], np.float32))
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(0, tree, META)
      restored = checkpointer.restore_latest()
    assert_same_tree(restored.tree, tree)

  def test_eight_devices_are_read_on_one(self):
    mesh = jax.make_mesh(
      (8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    replicated = jax.NamedSharding(mesh, jax.P())
    tree = jax.device_put({'a/b': np.arange(5.0, dtype='f4')}, replicated)
    assert len(tree['a/b'].devices()) == 8
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(1, tree, META)
    result = run_python(
      'import sys, jax; from ds_jax import checkpoint\n'
      'restored = checkpoint.restore(sys.argv[1])\n'
      'print(jax.device_count(), restored.tree["a/b"].tolist())',
      self.directory,
    )
    assert result.stdout == '1 [0.0, 1.0, 2.0, 3.0, 4.0]\n', result.stderr

  def test_arrays_may_be_donated_right_after_save(self):
    advance = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    expected = np.array(x)
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(0, {'x': x}, META)
      for _ in range(10):
        x = advance(x)
      restored = checkpointer.restore_latest()
    np.testing.assert_array_equal(restored.tree['x'], expected)

  def test_numpy_arrays_may_be_overwritten_right_after_save(self):
    x = np.arange(1_000_000, dtype=np.float32)
    expected = x.copy()
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(0, {'x': x}, META)
      x[:] = -1
      restored = checkpointer.restore_latest()
    np.testing.assert_array_equal(restored.tree['x'], expected)

  def test_relative_directory_is_taken(self):
    self.save_steps(4)
    restored = checkpoint.restore(os.path.relpath(self.directory))
    self.assert_is_step(restored, 4)


class RetentionTest(CheckpointTestCase):
  def save_scores(self, scores, **options):
    with checkpoint.Checkpointer(self.directory, **options) as checkpointer:
      for step, score in scores.items():
        metrics = None if score is None else {'top1': score, 'loss': -score}
        checkpointer.save(step, {'x': np.array(step)}, META, metrics)

  @parameterized.named_parameters(
    ('best_is_old', (0.1, 0.9, 0.2, 0.3, 0.4), ['1', '3', '4']),
    ('best_is_last', (0.1, 0.2, 0.3, 0.4, 0.5), ['3', '4']),
    ('tie_goes_to_the_newer', (0.5, 0.5, 0.1, 0.1, 0.1), ['1', '3', '4']),
    ('none_scored', (None,) * 5, ['3', '4']),
    ('some_scored', (None, 0.2, 0.1, None, None), ['1', '3', '4']),
    ('nan', (0.1, np.nan, 0.2, np.nan, 0.1), ['2', '3', '4']),
  )
  def test_last_two_and_best_are_kept(self, scores, kept):
    self.save_scores(dict(enumerate(scores)))
    assert self.step_names() == kept

  def test_best_two_of_another_metric(self):
    scores = dict(enumerate([0.1, 0.4, 0.3, 0.6, 0.5]))
    self.save_scores(scores, keep_last=1, keep_best=2, metric='loss')
    assert self.step_names() == ['0', '2', '4']

  def test_best_is_remembered_when_opened_again(self):
    self.save_scores({0: 0.1, 1: 0.9, 2: 0.2})
    self.save_scores({3: 0.3, 4: None, 5: None})
    assert self.step_names() == ['1', '4', '5']

  def test_damaged_steps_do_not_push_out_new_ones(self):
    self.save_steps(1, 8, 9, keep_last=3)
    for step in (8, 9):
      shutil.rmtree(self.directory / str(step) / 'state')
    with checkpoint.Checkpointer(self.directory, keep_last=1) as checkpointer:
      assert checkpointer.restore_latest().step == 1
      checkpointer.save(2, make_tree(2), {**META, 'global_step': 2})
      checkpointer.wait()
      assert self.step_names() == ['2']
      self.assert_is_step(checkpointer.restore_latest(), 2)

  def test_keeping_no_last_step_is_refused(self):
    with pytest.raises(ValueError, match='keep_last=0'):
      checkpoint.Checkpointer(self.directory, keep_last=0)


class DamageTest(CheckpointTestCase):
  """Step 1 is intact; step 2 is damaged in one place at a time."""

  def setUp(self):
    super().setUp()
    self.save_steps(1, 2)
    self.newest = self.directory / '2'

  def assert_newest_or_older(self, restored):
    assert restored.step in (1, 2)
    self.assert_is_step(restored, restored.step)

  def flipped_bits(self, path, count):
    """Yields after each flip, and puts the file right again."""
    whole = path.read_bytes()
    for position in np.linspace(0, len(whole) - 1, count).astype(int):
      broken = bytearray(whole)
      broken[position] ^= 1 << (position % 8)
      path.write_bytes(broken)
      yield
    path.write_bytes(whole)

  def test_flipped_bit_in_any_file_is_never_restored(self):
    for path in data_files(self.newest):
      for _ in self.flipped_bits(path, 12):
        self.assert_newest_or_older(checkpoint.restore(self.directory))

  def test_flipped_bit_in_the_largest_blob_falls_back(self):
    largest = max(data_files(self.newest), key=lambda path: path.stat().st_size)
    steps = []
    for _ in self.flipped_bits(largest, 60):
      restored = checkpoint.restore(self.directory)
      self.assert_newest_or_older(restored)
      steps.append(restored.step)
    # The rest of the blob is indexing that nothing reads.
    assert steps.count(1) > 30

  def test_flipped_bit_in_the_only_step_raises(self):
    shutil.rmtree(self.directory / '1')
    largest = max(data_files(self.newest), key=lambda path: path.stat().st_size)
    broken = bytearray(largest.read_bytes())
    broken[len(broken) // 2] ^= 1
    largest.write_bytes(broken)
    with pytest.raises(checkpoint.CheckpointError) as raised:
      self.restore_latest()
    message = str(raised.value)
    assert str(self.directory) in message
    assert 'step 2: ValueError: ' in message and 'kernel' in message
    assert 'intact copy' in message

  def test_flipped_bit_in_meta_falls_back(self):
    record = self.newest / 'manifest' / 'metadata'
    record.write_text(record.read_text().replace('0.1', '0.3'))
    self.assert_is_step(checkpoint.restore(self.directory), 1)

  @parameterized.parameters('empty', 'half', 'removed')
  def test_no_lost_file_gives_wrong_values(self, damage):
    steps = []
    for path in data_files(self.newest):
      whole = path.read_bytes()
      if damage == 'removed':
        path.unlink()
      else:
        path.write_bytes(whole[: len(whole) // 2 if damage == 'half' else 0])
      restored = self.restore_latest()
      self.assert_newest_or_older(restored)
      steps.append(restored.step)
      path.write_bytes(whole)
    assert 1 in steps
    self.assert_is_step(self.restore_latest(), 2)

  def test_fallback_is_logged_with_step_path_and_reason(self):
    shutil.rmtree(self.newest / 'state')
    with self.assertLogs('absl', level='WARNING') as logs:
      assert self.restore_latest().step == 1
    message = '\n'.join(logs.output)
    assert f'Step 2 in {self.newest} is damaged: ' in message
    assert 'state' in message.split('is damaged: ')[1]

  def test_empty_step_directory_is_passed_over(self):
    (self.directory / '3').mkdir()
    self.assert_is_step(self.restore_latest(), 2)

  def test_damaged_step_is_replaced_by_saving_it(self):
    (self.directory / '3').mkdir()
    shutil.rmtree(self.newest / 'manifest')
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      assert checkpointer.restore_latest().step == 1
      for step in (2, 3):
        checkpointer.save(step, make_tree(step), {**META, 'global_step': step})
        self.assert_is_step(checkpointer.restore_latest(), step)

  def test_step_that_vanished_is_saved_again(self):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      shutil.rmtree(self.newest)
      checkpointer.save(2, make_tree(2), {**META, 'global_step': 2})
      self.assert_is_step(checkpointer.restore_latest(), 2)

  def test_intact_step_is_not_written_again(self):
    before = snapshot(self.newest)
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(2, make_tree(5), META)
    assert snapshot(self.newest) == before

  def test_step_still_being_written_is_not_written_again(self):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(3, make_tree(3), {**META, 'global_step': 3})
      checkpointer.save(3, make_tree(5), META)
      self.assert_is_step(checkpointer.restore_latest(), 3)

  def test_kill_while_writing_leaves_the_step_before(self):
    result = run_python(
      'import os, signal, sys, numpy as np; from ds_jax import checkpoint\n'
      'checkpointer = checkpoint.Checkpointer(sys.argv[1])\n'
      'x = np.random.default_rng(0).normal(size=8_000_000)\n'
      'checkpointer.save(3, {"x": x}, {})\n'
      'while len(os.listdir(sys.argv[1])) < 3: pass\n'
      'os.kill(os.getpid(), signal.SIGKILL)',
      self.directory,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert '3' not in self.step_names() and len(self.step_names()) > 2
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      self.assert_is_step(checkpointer.restore_latest(), 2)
      checkpointer.save(3, make_tree(3), {**META, 'global_step': 3})
      self.assert_is_step(checkpointer.restore_latest(), 3)
    assert self.step_names() == ['2', '3']


_SAVE_UNTIL_FULL = """
import sys, numpy as np
from ds_jax import checkpoint
noise = np.random.default_rng(0).normal(size=1_000_000)
with checkpoint.Checkpointer(sys.argv[1]) as checkpointer:
  checkpointer.save(1, {'x': noise[:1000]}, {})
try:
  with checkpoint.Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(2, {'x': noise}, {})
except checkpoint.CheckpointError as error:
  print(error)
"""


class FullDiskTest(CheckpointTestCase):
  def assert_step_1_is_left(self, result, reason):
    assert result.returncode == 0, result.stderr
    assert f'Step 2 could not be written in {self.root}' in result.stdout
    assert reason in result.stdout and 'run the same command' in result.stdout
    assert checkpoint.restore(self.root).step == 1
    with checkpoint.Checkpointer(self.root) as checkpointer:
      assert checkpointer.restore_latest().step == 1

  def setUp(self):
    super().setUp()
    self.root = self.directory / 'checkpoints'

  def test_a_quota_that_is_used_up_leaves_the_step_before(self):
    limit = 'import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (400_000,) * 2)'
    result = run_python(limit + _SAVE_UNTIL_FULL, self.root)
    self.assert_step_1_is_left(result, 'File too large')

  def test_a_full_disk_leaves_the_step_before(self):
    with mounted_memory(self.directory, 'size=2m'):
      result = run_python(_SAVE_UNTIL_FULL, self.root)
      self.assert_step_1_is_left(result, 'No space left on device')
      # With room again, the same step is saved.
      subprocess.run(
        ['mount', '-o', 'remount,size=30m', self.directory], check=True
      )
      result = run_python(_SAVE_UNTIL_FULL, self.root)
      assert result.stdout == '', result.stdout
      assert checkpoint.restore(self.root).step == 2

  def test_a_read_only_disk_is_refused_at_the_start(self):
    with (
      mounted_memory(self.directory, 'ro'),
      pytest.raises(
        checkpoint.CheckpointError,
        match='can not be written to: .*Read-only file system.* Choose another',
      ),
    ):
      checkpoint.Checkpointer(self.root)

  def test_a_file_in_the_way_is_refused_at_the_start(self):
    self.root.write_text('')
    with pytest.raises(
      checkpoint.CheckpointError, match='can not be written to: '
    ):
      checkpoint.Checkpointer(self.root / 'below')


class ReadingTest(CheckpointTestCase):
  @parameterized.parameters(None, 2)
  def test_restore_writes_nothing(self, step):
    self.save_steps(1, 2)
    for path in [self.directory, *self.directory.rglob('*')]:
      path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(self.directory)
    self.assert_is_step(checkpoint.restore(self.directory, step), 2)
    assert snapshot(self.directory) == before
    for path in [self.directory, *self.directory.rglob('*')]:
      path.chmod(0o755)

  def test_older_step_is_restored_by_number(self):
    self.save_steps(1, 2)
    self.assert_is_step(checkpoint.restore(self.directory, 1), 1)

  def test_damaged_step_asked_for_by_number_raises(self):
    self.save_steps(1, 2)
    shutil.rmtree(self.directory / '2' / 'state')
    with pytest.raises(checkpoint.CheckpointError, match='step 2: '):
      checkpoint.restore(self.directory, 2)

  def test_missing_directory_raises_and_is_not_made(self):
    missing = self.directory / 'missing'
    with pytest.raises(checkpoint.CheckpointError, match='no directory'):
      checkpoint.restore(missing)
    assert not missing.exists()

  def test_directory_without_steps_raises(self):
    (self.directory / 'logs').mkdir()
    with pytest.raises(checkpoint.CheckpointError, match='no folder named by'):
      checkpoint.restore(self.directory)

  def test_missing_step_names_the_ones_there(self):
    self.save_steps(1, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r'one of \[1, 2\]'):
      checkpoint.restore(self.directory, 3)

  def test_new_directory_has_nothing_to_restore(self):
    assert self.restore_latest() is None


class RefusalTest(CheckpointTestCase):
  def save(self, *args):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(0, *args)

  @parameterized.named_parameters(
    ('python_number', {'a': {'b': 3}}, r"\['a'\]\['b'\] is a int"),
    ('list', {'a': [np.zeros(1)]}, 'expected nested dicts with str keys'),
    ('int_key', {0: np.zeros(1)}, 'expected nested dicts with str keys'),
  )
  def test_other_trees_are_refused(self, tree, message):
    with pytest.raises(TypeError, match=message):
      self.save(tree, META)

  def test_names_that_orbax_would_mix_up_are_refused(self):
    tree = {'a.b': np.zeros(1), 'a': {'b': np.ones(1)}}
    with pytest.raises(ValueError, match='stored as a.b'):
      self.save(tree, META)

  def test_meta_beyond_json_is_refused_at_once(self):
    with pytest.raises(TypeError, match='not JSON serializable'):
      self.save(make_tree(0), {'x': np.zeros(1)})

  def test_metrics_without_the_ranking_one_are_refused(self):
    with pytest.raises(ValueError, match=r"\['loss'\] lack 'top1'"):
      self.save(make_tree(0), META, {'loss': 1.0})


@contextlib.contextmanager
def deleted_when_read(*saved):
  """Deletes step 2 as it is to be read, once a run has saved these."""
  read = checkpoint._read

  def read_late(root, step):
    if step == 2 and (root / '2').is_dir():
      for newer in saved:
        with checkpoint.Checkpointer(folder, keep_last=9) as saver:
          saver.save(newer, make_tree(newer), META)
      shutil.rmtree(root / '2')
    return read(root, step)

  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(checkpoint, '_read', read_late),
  ):
    with checkpoint.Checkpointer(folder, keep_last=9) as saver:
      for step in (1, 2):
        saver.save(step, make_tree(step), META)
    yield folder


class RunningTest(parameterized.TestCase):
  """Restoring while a run saves new steps and deletes old ones."""

  def test_a_step_that_is_deleted_gives_way_to_a_newer_one(self):
    with tempfile.TemporaryDirectory() as folder:
      with checkpoint.Checkpointer(folder, keep_last=2) as saver:
        saver.save(1, make_tree(1), META)
      read, reads = checkpoint._read, []

      def read_while_a_run_goes_on(root, step):
        reads.append(step)
        if len(reads) <= 3:
          with checkpoint.Checkpointer(folder, keep_last=2) as saver:
            saver.save(step + 1, make_tree(step + 1), META)
          shutil.rmtree(root / str(step))
        return read(root, step)

      with mock.patch.object(checkpoint, '_read', read_while_a_run_goes_on):
        found = checkpoint.restore(folder)
      assert found.step == 4 and reads == [1, 2, 3, 4]
      assert_same_tree(found.tree, make_tree(4))

  def test_an_older_step_is_not_taken_while_there_is_a_newer_one(self):
    with deleted_when_read(3) as folder:
      assert checkpoint.restore(folder).step == 3

  def test_an_evaluation_of_a_run_that_goes_on_looks_again_too(self):
    with deleted_when_read(3) as folder:
      shutil.rmtree(pathlib.Path(folder) / '1')
      with checkpoint.Checkpointer(folder) as reader:
        assert reader.restore_latest().step == 3

  def test_a_deleted_step_is_not_called_damaged(self):
    with deleted_when_read() as folder, self.assertNoLogs('absl', 'WARNING'):
      assert checkpoint.restore(folder).step == 1
    with (
      deleted_when_read() as folder,
      pytest.raises(checkpoint.CheckpointError, match=r'\[2\] in .* deleted'),
    ):
      checkpoint.restore(folder, 2)

  def test_a_step_that_is_damaged_is_an_error_as_ever(self):
    with tempfile.TemporaryDirectory() as folder:
      with checkpoint.Checkpointer(folder) as saver:
        saver.save(1, make_tree(1), META)
      shutil.rmtree(pathlib.Path(folder) / '1/state')
      with pytest.raises(checkpoint.CheckpointError, match='No intact'):
        checkpoint.restore(folder)


@pytest.mark.parametrize(
  ('stage', 'phase', 'has_gate'),
  [
    ('supernet', 'supernet', False),
    ('gate', 'gate', True),
    ('budget', 'held_out', True),  # of format 1
    ('held_out', 'held_out', True),
  ],
)
def test_a_run_of_format_2_says_stage_for_phase(
  tmp_path, monkeypatch, stage, phase, has_gate
):
  written = {
    'stage': stage,
    'position': {'stage': 2, 'step': 5},
    'gate': {'target': 'sandwich', 'target_madds': 3.0},
    'interpolation': 'bicubic',
  }
  monkeypatch.setattr(checkpoint, 'FORMAT', 2)
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(5, {'x': np.zeros(1)}, written)
  monkeypatch.undo()
  assert checkpoint.restore(tmp_path).meta == {
    'phase': phase,
    'position': {'phase': 2, 'step': 5},
    'gate_target': written['gate'],
    'has_gate': has_gate,
    'interpolation': 'bicubic',
  }


def test_a_conversion_of_format_1_has_no_interpolation(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT', 1)
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(0, {'x': np.zeros(1)}, {'stage': 'converted', 'has_gate': True})
  monkeypatch.undo()
  assert checkpoint.restore(tmp_path).meta == {
    'phase': 'converted',
    'has_gate': True,
    'interpolation': 'bilinear',
  }


def test_a_step_of_a_newer_format_is_no_damaged_one(tmp_path):
  """It is not passed over for an older step."""
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(1, make_tree(1), META)
    saver.wait()
    with mock.patch.object(checkpoint, 'FORMAT', 4):
      saver.save(2, make_tree(2), META)
  expected = (
    'has format 4, and this ds_jax knows 1 to 3: it was saved by a newer'
  )
  with pytest.raises(checkpoint.CheckpointError, match=expected):
    checkpoint.restore(tmp_path)
  assert checkpoint.restore(tmp_path, 1).step == 1
  with (
    checkpoint.Checkpointer(tmp_path) as saver,
    pytest.raises(checkpoint.CheckpointError, match=expected),
  ):
    saver.restore_latest()
  assert {path.name for path in tmp_path.iterdir()} == {'1', '2'}
