"""Checkpoints: written in the background, checked when read.

A thin layer over Orbax's CheckpointManager. Every step holds two items:

* `state`, the arrays;
* `manifest`, a JSON record of the format's version, the caller's `meta`, the
  step's metrics, and the data type, shape and CRC-32 of every leaf, with a
  CRC-32 of itself.

Orbax restores most flipped bits without a word; the manifest is what turns
them into an error, and so into a fall back to the step before.

With several processes the directory is one that all see. Process 0 writes, and
decides which step is restored; every process holds all of the arrays.
"""

import contextlib
import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from ds_jax import hosts, paths

# Of what a step holds. See `_in_todays_words` for what the others call it.
FORMAT = 3


class CheckpointError(Exception):
  """There is no intact checkpoint to restore, or none can be written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that passed every check.

  Attributes:
    step: the step it was saved at.
    tree: a nested dict of NumPy arrays, bit for bit what was saved.
    meta: what the caller saved beside it.
  """

  step: int
  tree: dict[str, Any]
  meta: dict[str, Any]


class Checkpointer:
  """Saves to a directory, keeping the newest and the best steps."""

  def __init__(
    self,
    directory: str,
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    metric: str = 'top1',
  ):
    """Opens the directory, and makes it if it isn't there.

    Args:
      directory: where the steps lie, one folder each.
      keep_last: how many of the newest steps to keep, at least 1.
      keep_best: how many of the steps with the highest metric to keep, too.
      metric: which of the metrics given to `save` ranks the steps.

    Raises:
      CheckpointError: if the directory can't be made or written to.
    """
    import orbax.checkpoint as ocp

    if keep_last < 1:
      raise ValueError(f'keep_last={keep_last}: resuming needs at least 1.')
    self._directory = paths.expanded(directory)
    self._metric = metric
    self._retention = _Retention(
      keep_last, keep_best, _saved_scores(self._directory, metric)
    )
    _check_writable(self._directory)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(preservation_policy=self._retention),
    )
    self._saving: int | None = None

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def save(
    self,
    step: int,
    tree: Mapping[str, Any],
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing a step, and returns once the arrays are copied.

    The caller may donate or overwrite the arrays at once. A step that is on
    disk intact is left as it is; one that is damaged is replaced. An error of
    the write before this one is raised here.

    Args:
      step: the step's number.
      tree: a nested dict, str to jax or NumPy array.
      meta: anything that JSON can hold.
      metrics: the step's scores; without them it is never among the best.

    Raises:
      CheckpointError: if writing fails; the steps before are untouched.
      TypeError: if a leaf is not an array, or meta does not fit into JSON.
      ValueError: if metrics are given without the one that ranks.
    """
    import orbax.checkpoint as ocp

    arrays = _host_arrays(tree)
    manifest = _manifest(arrays, meta, metrics)
    score = _score(manifest['metrics'], self._metric)
    self.wait()
    if step in self._manager.all_steps():
      if self._is_intact(step):
        return
      self._manager.delete(step)
    self._retention.damaged.discard(step)
    self._retention.scores[step] = score
    self._saving = step
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(arrays),
          manifest=ocp.args.JsonSave(manifest),
        ),
        # Otherwise a step older than a damaged one would be skipped.
        force=True,
      )

  def restore_latest(self) -> Restored | None:
    """Returns the newest intact step, or None if there are no steps.

    Steps that are passed over are logged; they stay on disk until a later
    save has been written.

    Raises:
      CheckpointError: if there are steps, and none is intact.
    """
    self.wait()
    if not hosts.from_first(lambda: bool(_steps(self._directory))):
      return None
    found: list[Restored] = []

    def find():
      restored, damaged = _newest_intact(self._directory)
      found.append(restored)
      return [restored.step, sorted(damaged)]

    step, damaged = hosts.from_first(find, CheckpointError)
    self._retention.damaged.update(damaged)
    return found[0] if found else restore(self._directory, step)

  def wait(self) -> None:
    """Waits for the write in progress.

    Raises:
      CheckpointError: if it failed.
    """
    with self._explained():
      self._manager.wait_until_finished()
    self._saving = None

  def close(self) -> None:
    """Waits for the write in progress and ends the background threads.

    Raises:
      CheckpointError: if the write failed.
    """
    with self._explained():
      self._manager.close()

  def _is_intact(self, step):
    def check():
      with contextlib.suppress(CheckpointError):
        _newest_intact(self._directory, step)
        return True
      return False

    return hosts.from_first(check)

  @contextlib.contextmanager
  def _explained(self):
    """Says of Orbax's errors what they mean."""
    try:
      yield
    # Whatever its parts raise, as in reading.
    except Exception as error:
      step, self._saving = self._saving, None
      if step is None or hosts.is_lost_peer(error):
        raise
      raise CheckpointError(
        f'Step {step} could not be written in {self._directory}:'
        f' {_brief(error)} Steps that were saved before are as they were. Make'
        ' room or set the permissions right, and run the same command: it'
        ' resumes from the last of them.'
      ) from error


def directory_of(workdir: str) -> str:
  """Returns where a workdir's checkpoints are."""
  return str(epath.Path(workdir) / 'checkpoints')


def has_steps(directory: str) -> bool:
  """Whether anything was saved there, whole or not."""
  return bool(_steps(paths.expanded(directory)))


def is_workdir(path: str) -> bool:
  """Whether a path is the workdir of a run or a conversion."""
  return paths.expanded(directory_of(path)).is_dir()


def restore(directory: str, step: int | None = None) -> Restored:
  """Restores without writing: the directory may be read-only.

  Args:
    directory: where a `Checkpointer` saved.
    step: which step; None means the newest intact one, of a run that may go on.

  Raises:
    CheckpointError: if there is no such directory or step, or it is damaged.
  """
  root = paths.expanded(directory)
  steps = _steps(root)
  if not steps:
    found = 'no folder named by a step' if root.is_dir() else 'no directory'
    raise CheckpointError(
      f'No checkpoints in {root}: there is {found}. Check the path.'
    )
  if step is not None and step not in steps:
    raise CheckpointError(f'No step {step} in {root}: choose one of {steps}.')
  return _newest_intact(root, step)[0]


def newest_meta(directory: str) -> dict[str, Any] | None:
  """Returns what the newest step says of itself; None if there is none.

  Only that is read: the arrays may be damaged.
  """
  root = paths.expanded(directory)
  for step in reversed(_steps(root)):
    # One that is damaged is reported when its step is restored.
    with contextlib.suppress(Exception):
      manifest = _read_manifest(root, step)
      return _in_todays_words(manifest['meta'], manifest.get('format', 1))
  return None


@dataclasses.dataclass
class _Retention:
  """Keeps the newest and the best steps; damaged ones count as neither.

  Orbax's own BestN needs its metrics item, and one damaged metrics file stops
  the manager from opening. Its LatestN counts damaged steps, which would push
  out the steps that are saved after falling back from them.
  """

  keep_last: int
  keep_best: int
  scores: dict[int, float | None]
  damaged: set[int] = dataclasses.field(default_factory=set)

  def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
    """Implements Orbax's PreservationPolicy."""
    del context
    intact = sorted({info.step for info in checkpoints} - self.damaged)
    scored = [step for step in intact if self.scores.get(step) is not None]
    best = sorted(scored, key=lambda step: (self.scores[step], step))[::-1]
    kept = {*intact[-self.keep_last :], *best[: self.keep_best]}
    return [info.step in kept for info in checkpoints]


def _steps(root: epath.Path) -> list[int]:
  """Returns the steps on disk, whole or not, oldest first."""
  paths = root.iterdir() if root.is_dir() else ()
  return sorted(int(path.name) for path in paths if path.name.isdecimal())


def _newest_intact(
  root: epath.Path, only: int | None = None
) -> tuple[Restored, dict[int, str]]:
  """Returns the newest intact step, or one, and why each newer one is not."""
  deleted, damaged = [], {}

  def untried():
    steps = _steps(root) if only is None else [only]
    return [step for step in steps if step not in (*deleted, *damaged)]

  # Listed again after each failure: a run that goes on deletes old steps while
  # they are read, and has saved newer ones by then.
  while steps := untried():
    step = steps[-1]
    try:
      return _read(root, step), damaged
    except CheckpointError:
      raise
    # Orbax raises whatever its parts raise, down to a bare Exception.
    except Exception as error:
      if not (root / str(step)).is_dir():
        deleted.append(step)
        continue
      damaged[step] = _brief(error)
      logging.warning(
        'Step %d in %s is damaged: %s', step, root / str(step), damaged[step]
      )
  if not damaged:
    raise CheckpointError(
      f'The steps {deleted} in {root} were deleted while they were read, and'
      ' there are no newer ones. If a run goes on there, try again; else put an'
      ' intact copy in their place.'
    )
  reasons = ''.join(f'\n  step {k}: {why}' for k, why in damaged.items())
  raise CheckpointError(
    f'No intact checkpoint in {root}:{reasons}\nPut an intact copy in its'
    ' place, or move the directory away to start again.'
  )


def _read(root: epath.Path, step: int) -> Restored:
  """Reads one step; raises, with any exception, unless it is intact.

  Raises:
    CheckpointError: if its format is not known here.
  """
  import orbax.checkpoint as ocp

  manifest = _read_manifest(root, step)
  options = _alone()
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    tree = reader.restore(root / str(step) / 'state')
  saved, found = manifest['leaves'], _leaf_records(tree)
  for name in {**saved, **found}:
    if saved.get(name) != found.get(name):
      raise ValueError(f'the leaf {name} differs from its checksum')
  meta = _in_todays_words(manifest['meta'], manifest.get('format', 1))
  return Restored(step, tree, meta)


def _in_todays_words(meta: dict[str, Any], written: int) -> dict[str, Any]:
  """Returns what a run or a conversion of an older format says of itself.

  Formats 1 and 2 say `stage` for a phase, `budget` for `held_out`, and `gate`
  for `gate_target`; whether the gate is trained goes by the phase. Format 1 has
  a mask that says where there is an image held out (see
  `routing.images_held_out`), and may have no `interpolation`.
  """
  if written >= 3 or 'stage' not in meta:
    return meta
  meta = {'interpolation': 'bilinear', 'has_gate': False, **meta}
  stage = meta.pop('stage')
  meta['phase'] = 'held_out' if stage == 'budget' else stage
  meta['has_gate'] |= meta['phase'] in ('gate', 'held_out')
  if 'gate' in meta:
    meta['gate_target'] = meta.pop('gate')
  if 'position' in meta:
    position = meta['position']
    meta['position'] = {'phase': position['stage'], 'step': position['step']}
  return meta


def _alone():
  """Orbax's options to read without waiting for other processes."""
  from orbax.checkpoint import options

  index = jax.process_index()
  return options.MultiprocessingOptions(
    primary_host=index,
    active_processes={index},
    barrier_sync_key_prefix=f'process_{index}',
  )


def _read_manifest(root: epath.Path, step: int) -> dict[str, Any]:
  import orbax.checkpoint as ocp

  options = _alone()
  handler = ocp.JsonCheckpointHandler(multiprocessing_options=options)
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    manifest = dict(reader.restore(root / str(step) / 'manifest'))
  if manifest.pop('crc32', None) != _json_crc32(manifest):
    raise ValueError('the manifest differs from its checksum')
  saved = manifest.get('format', 1)
  if saved > FORMAT:
    raise CheckpointError(
      f'{root / str(step)} has format {saved}, and this ds_jax knows 1 to'
      f' {FORMAT}: it was saved by a newer one. Install that, or restore'
      ' another step.'
    )
  return manifest


def _saved_scores(root: epath.Path, metric: str) -> dict[int, float | None]:
  scores = {}
  for step in _steps(root):
    # A damaged manifest is reported when its step is restored.
    with contextlib.suppress(Exception):
      scores[step] = _score(_read_manifest(root, step)['metrics'], metric)
  return scores


def _score(metrics: Mapping[str, float] | None, metric: str) -> float | None:
  if not metrics:
    return None
  if metric not in metrics:
    raise ValueError(
      f'The metrics {sorted(metrics)} lack {metric!r}, which ranks the'
      ' checkpoints: add it, pass None, or set Checkpointer(metric=...).'
    )
  return None if math.isnan(metrics[metric]) else metrics[metric]


def _manifest(
  arrays: Mapping[str, Any],
  meta: Mapping[str, Any],
  metrics: Mapping[str, float] | None,
) -> dict[str, Any]:
  body = {
    'format': FORMAT,
    'meta': meta,
    'metrics': metrics and {k: float(v) for k, v in metrics.items()},
    'leaves': _leaf_records(arrays),
  }
  # Tuples become lists before the checksum, as they would on the way back.
  body = json.loads(json.dumps(body))
  return {**body, 'crc32': _json_crc32(body)}


def _json_crc32(body: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _leaf_records(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns, by path, what each leaf must read back as."""
  leaves = jax.tree_util.tree_leaves_with_path(
    arrays, is_leaf=lambda node: isinstance(node, dict) and not node
  )
  return {
    json.dumps([entry.key for entry in path]): _leaf_record(leaf)
    for path, leaf in leaves
  }


def _leaf_record(leaf: np.ndarray | dict) -> dict[str, Any]:
  if isinstance(leaf, dict):
    return {}
  return {
    'dtype': leaf.dtype.name,
    'shape': list(leaf.shape),
    'crc32': zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)),
  }


def _host_arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
  _check_tree(tree)
  # Views, perhaps, but Orbax copies host arrays before its save returns.
  return hosts.fetch(tree)


def _check_writable(directory: epath.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.write-{jax.process_index()}'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise CheckpointError(
      f'{directory} can not be written to: {_brief(error)} Choose another'
      ' workdir, or set its permissions right.'
    ) from error


def _brief(error: Exception) -> str:
  # TensorStore appends its whole configuration, and has the reason in between.
  text = f'{type(error).__name__}: {error}'
  reason = re.search(r'Failed to \w+ [^"\[]*', text[200:])
  text = text[:200] + (f' ... {reason.group().strip()}' if reason else '')
  return text if text.endswith('.') else f'{text}.'


def _check_tree(tree: Mapping[str, Any]) -> None:
  """Refuses what Orbax would restore as something else."""
  stored_names = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    keys = [getattr(entry, 'key', None) for entry in path]
    if not (
      all(isinstance(key, str) for key in keys)
      and isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    ):
      raise TypeError(
        f'The leaf {jax.tree_util.keystr(path)} is a {type(leaf).__name__}:'
        ' expected nested dicts with str keys and jax or NumPy arrays; put the'
        ' rest into meta.'
      )
    if '.'.join(keys) in stored_names:
      raise ValueError(
        f'Two leaves would be stored as {".".join(keys)}: rename the key that'
        ' has a dot in it.'
      )
    stored_names.add('.'.join(keys))
