"""The two-stage run: train, save, resume, evaluate."""

import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import flax.struct
import jax
from absl import logging
from clu import parameter_overview
from flax import serialization

from ds_jax import (
  checkpoint,
  data,
  evaluation,
  hosts,
  models,
  parallel,
  paths,
  routing,
)
from ds_jax import config as config_lib
from ds_jax.train import metrics as metrics_lib
from ds_jax.train import monitor, phases, resume, warm_start

# What a checkpoint past the last phase says it is.
_TRAINED = 'held_out'


class NonFiniteError(Exception):
  """A loss or a gradient is no longer a number."""


class Preempted(Exception):
  """The process was asked to end, and its state is saved."""


@dataclasses.dataclass(frozen=True)
class Position:
  """How far the schedule has come.

  Attributes:
    phase: index into the phases; past the last of them, the network is trained
      and the images held out are swept.
    step: how many steps of it are done.
  """

  phase: int = 0
  step: int = 0


def train(config, workdir: str) -> evaluation.Results:
  """Runs the whole schedule, from wherever the workdir's last save is.

  Args:
    config: an experiment's `ConfigDict`.
    workdir: gets `checkpoints/`, `metrics.jsonl` and `results.json`.

  Returns:
    What `results.json` holds.

  Raises:
    ConfigError: for a config that is wrong, or not the saved run's.
    NonFiniteError: if training diverges; the last save is finite.
    Preempted: after SIGTERM, once the state is saved.
  """
  with Run(config, workdir) as run:
    if jax.process_index() == 0:
      logging.info('\n%s\n%s', run.overview(), run.choice())
    position, state = run.restore() or run.start()
    run.start_clock()
    while position.phase < len(run.phases):
      state = run.train_phase(position, state)
      position = Position(position.phase + 1)
      state = run.next_phase(position, state)
    return run.evaluate(state)


def evaluate_only(config, workdir: str) -> evaluation.Results:
  """Evaluates the workdir's newest checkpoint, at whatever phase it is.

  Args:
    config: an experiment's `ConfigDict`, the saved run's.
    workdir: gets `results.json`.

  Returns:
    What `results.json` holds.

  Raises:
    CheckpointError: if there is no intact checkpoint.
    ConfigError: for a config that is wrong, or not the saved run's.
  """
  directory = checkpoint.directory_of(workdir)
  if not checkpoint.has_steps(directory):
    raise checkpoint.CheckpointError(
      f'No checkpoints in {directory}; train first, or check --workdir.'
    )
  with Run(config, workdir) as run:
    _, state = run.restore()
    return run.evaluate(state)


@flax.struct.dataclass
class Trained:
  """What a run ends with.

  Attributes:
    network: the trained network.
    outcomes: what its buckets and its gate say of images that no phase has
      seen, from which budgets are set; None where none are held out.
  """

  network: models.Variables
  outcomes: routing.Outcomes | None


class Run:
  """An experiment in a workdir: the parts that `train` is made of."""

  def __init__(self, config, workdir: str):
    """Builds the model and the phases, and opens the workdir.

    Raises:
      CheckpointError: if the workdir can't be written.
      ConfigError: if the parts can't be built.
      HostError: if the processes don't run the same.
    """
    self._workdir = _local_path(workdir)
    given = config_lib.Experiment.from_config(config)
    self._info = _dataset_info(given)
    saved = checkpoint.newest_meta(checkpoint.directory_of(workdir))
    self._experiment = warm_start.with_statistics(
      phases.with_classes(given, self._info), saved
    )
    self._class_names = phases.class_names(self._experiment, self._info)
    # Statistics as they were given: None goes by the weights.
    self._config = dataclasses.asdict(
      dataclasses.replace(self._experiment, dataset=given.dataset)
    )
    self._bad_images = data.BadImages()
    fields = resume.flatten(self._config)
    fields |= {
      'dataset.class_names': list(self._class_names),
      'dataset.mean': self._experiment.dataset.mean,
      'dataset.std': self._experiment.dataset.std,
    }
    hosts.check_same_run(
      {k: v for k, v in fields.items() if k not in resume.FREE_FIELDS}
    )
    phases.check_dataset(self._experiment, self._info)
    try:
      self._executor = parallel.Executor(self._experiment.parallel)
      self._executor.check_batch_size(self._experiment.micro_batch_size)
      self._model = models.create_model(
        **{'seed': self._experiment.seed, **self._experiment.model}
      )
      self._experiment = phases.with_target(self._experiment, self._model)
      self.phases = phases.make_phases(
        self._experiment, self._model, self._executor
      )
      self._num_images = data.num_images(self._experiment.dataset)
      hosts.check_same_images(self._num_images)
      self._gate_target = routing.GateTarget(
        self._experiment.gate.target, self._experiment.gate.target_madds
      )
    except ValueError as error:
      raise config_lib.ConfigError(str(error)) from error
    self._evaluator = evaluation.Evaluator(
      self._model,
      data.normalizer(self._experiment.dataset),
      self._executor,
    )
    self._checkpointer = checkpoint.Checkpointer(
      checkpoint.directory_of(workdir),
      keep_last=self._experiment.checkpoint.keep_last,
      keep_best=self._experiment.checkpoint.keep_best,
      metric='held_out/top1',
    )
    self._writer = metrics_lib.MetricWriter(
      self._workdir, enabled=jax.process_index() == 0
    )
    self._termination = hosts.Termination()
    # Read once, since it opens the train part of the data.
    self._eval_every_steps = phases.eval_every_steps(self._experiment)
    self._clock = monitor.Clock()
    self._profile = monitor.Profile(self._experiment.monitor, self._workdir)
    self._watchdog = monitor.Watchdog(self._experiment.monitor.watchdog_seconds)
    self._resources = contextlib.ExitStack()
    for part in (
      self._watchdog,  # closed last, since all others may hang
      self._writer,
      self._checkpointer,
      self._clock,
      self._profile,
    ):
      self._resources.callback(part.close)

  def __enter__(self) -> 'Run':
    return self

  def __exit__(self, *exc_info) -> None:
    self._resources.close()
    if self._bad_images:
      logging.warning(
        '%d images could not be read and were skipped; each is named above.',
        len(self._bad_images),
      )

  def overview(self) -> str:
    """Returns the model's parameters as a table."""
    return parameter_overview.get_parameter_overview(
      models.variables_of(self._model).params
    )

  def choice(self) -> str:
    """Returns in words which checkpoints of Stage I are kept, and by what."""
    keep_best = self._experiment.checkpoint.keep_best
    part = self._experiment.choice_part
    if not keep_best:
      return 'The newest checkpoints are kept.'
    if part:
      return (
        f'The newest checkpoints are kept, and the best {keep_best} of Stage I'
        f' by the images of the {part} part, which no phase trains on.'
      )
    return (
      'The newest checkpoints are kept, and none for being the best:'
      f' checkpoint.keep_best={keep_best} chooses by images that no phase'
      ' trains on, never by test images, and none are held out. To choose, set'
      ' dataset.budget_share.'
    )

  def start_clock(self) -> None:
    """Leaves out of goodput what was done until now."""
    self._clock.read()

  def start(self) -> tuple[Position, Any]:
    """Returns the state before the first step of the first phase."""
    variables = warm_start.initial_variables(self._experiment, self._model)
    return Position(), self.phases[0].init(variables)

  def restore(self) -> tuple[Position, Any] | None:
    """Returns where the last intact save left off; None if there is none."""
    restored = self._checkpointer.restore_latest()
    if restored is None:
      return None
    if restored.meta['phase'] not in (*phases.NAMES, _TRAINED):
      raise config_lib.ConfigError(
        f'{checkpoint.directory_of(self._workdir)} holds a'
        f' {restored.meta["phase"]} network, not a run; choose a new workdir.'
      )
    position = Position(**restored.meta['position'])
    resume.check_same_config(
      restored.meta['config'],
      self._config,
      phases.NAMES[: position.phase + 1],
    )
    resume.check_same_images(
      restored.meta.get('class_names'),
      restored.meta.get('num_images'),
      self._class_names,
      self._num_images,
    )
    logging.info(
      'Resuming %s at step %d, from %s.',
      restored.meta['phase'],
      position.step,
      checkpoint.directory_of(self._workdir),
    )
    resume.warn_of_other_versions(restored.meta.get('versions', {}))
    if restored.meta['phase'] == _TRAINED:
      network = models.variables_from(restored.tree['network'])
      outcomes = routing.images_held_out(restored.tree)
      return position, Trained(self._executor.put(network), outcomes)
    # `init` makes the structure; every array in it is replaced.
    template = self.phases[position.phase].init(
      models.variables_of(self._model)
    )
    state = serialization.from_state_dict(template, restored.tree)
    return position, self._executor.put(state)

  def train_phase(self, position: Position, state: Any) -> Any:
    """Runs the rest of a phase, and saves at its end at the latest.

    Args:
      position: where to begin.
      state: the phase's state there; donated.

    Returns:
      The state at the phase's end.
    """
    phase = self.phases[position.phase]
    if position.step >= phase.num_steps:
      return state
    progress = _Progress(phase.num_steps, self._experiment.dataset.batch_size)
    with (
      contextlib.closing(self._train_batches(position)) as batches,
      self._termination,
    ):
      for step in range(position.step, phase.num_steps):
        with self._clock.spent_on('data'):
          batch = next(batches)
        done = Position(position.phase, step + 1)
        with self._profile.step(self._global_step(done) - 1):
          state, scalars = phase.step(state, batch, step)
          progress.add(scalars)
        self._watchdog.reset()
        self._after_step(done, state, progress)
    return state

  def next_phase(self, position: Position, state: Any) -> Any:
    """Returns the state where another phase begins, or the trained network.

    The outcomes of images held out are saved with that, so that a `Predictor`
    keeps budgets.

    Args:
      position: the beginning of the phase.
      state: at the end of the phase before.
    """
    if position.phase < len(self.phases):
      return self.phases[position.phase].init(state.network)
    if not self._experiment.dataset.budget_share:
      return Trained(state.network, None)
    with self._clock.spent_on('evaluate'):
      outcomes = self._evaluator.held_out(
        state.network, self._eval_batches('budget')
      )
    trained = Trained(state.network, outcomes)
    done = dataclasses.replace(position, step=1)
    right = outcomes.right.mean(0)
    self._writer.write(
      self._global_step(done),
      _TRAINED,
      {'right/narrowest': float(right[0]), 'right/last': float(right[-1])},
    )
    self._save(done, trained)
    return trained

  def evaluate(self, state: Any) -> evaluation.Results:
    """Sweeps the test images; writes and prints the results."""
    image_size = self._experiment.dataset.image_size
    held_out = getattr(state, 'outcomes', None)
    router = routing.gate_at_target(
      held_out,
      routing.BucketCosts.of_model(self._model, image_size),
      self._gate_target,
    )
    results = evaluation.summarize(
      self._evaluator.sweep(state.network, self._eval_batches()),
      self._model,
      image_size,
      gate_target=self._gate_target,
      held_out=held_out,
      routed=self._evaluator.routed_sweep(
        state.network, router, self._eval_batches()
      ),
    )
    results = {**results, 'class_names': list(self._class_names)}
    if jax.process_index() == 0:
      evaluation.write(results, self._workdir)
      logging.info(
        'Results, also in %s:\n%s', self._workdir, evaluation.table(results)
      )
    return results

  def _after_step(self, done: Position, state, progress: '_Progress') -> None:
    """Logs, evaluates, saves and stops, each when it is due."""
    experiment = self._experiment
    # Read once: a signal may come at any moment.
    stops = self._termination.is_due(self._global_step(done))
    ends = done.step == self.phases[done.phase].num_steps
    evaluates = (
      phases.NAMES[done.phase] == 'supernet'
      and (ends or done.step % self._eval_every_steps == 0)
      # Evaluation is skipped when preempted.
      and not stops
    )
    saves = (
      ends
      or evaluates
      or done.step % experiment.checkpoint.every_steps == 0
      or stops
    )
    if saves or done.step % experiment.log_every_steps == 0:
      self._log(done, progress)
    if saves:
      scores = None
      if evaluates:
        with self._clock.spent_on('evaluate'):
          scores = self._ends(done, state)
      with self._clock.spent_on('save'):
        self._save(done, state, scores)
      self._watchdog.reset()
      progress.restart()
    if stops:
      self._checkpointer.wait()
      raise Preempted(
        f'SIGTERM: saved {phases.NAMES[done.phase]} at step {done.step};'
        ' the same command resumes there.'
      )

  def _log(self, done: Position, progress: '_Progress') -> None:
    """Writes the scalars since the last row; they must all be finite."""
    scalars = progress.summary(done.step)
    phase = phases.NAMES[done.phase]
    bad = [k for k, v in scalars.items() if not math.isfinite(v)]
    if bad:
      raise NonFiniteError(
        f'{phase} diverged by step {done.step}: {", ".join(bad)} not finite.'
        ' The last checkpoint is from before; lower'
        f' {phase}.optimizer.learning_rate or set'
        f' {phase}.optimizer.clip_norm, in a new workdir.'
      )
    scalars |= {**self._clock.read(), **monitor.device_memory()}
    self._writer.write(self._global_step(done), phase, scalars)

  def _ends(self, done: Position, state) -> dict[str, float] | None:
    """Evaluates the narrowest and the widest; returns what may choose."""
    part = self._experiment.choice_part
    top1 = self._evaluator.ends(
      state.network, self._eval_batches(part or 'test')
    )
    prefix = 'held_out' if part else 'test'
    scores = {f'{prefix}/{name}': value for name, value in top1.items()}
    phase = phases.NAMES[done.phase]
    self._writer.write(self._global_step(done), phase, scores)
    return scores if part else None

  def _save(self, done: Position, state, scores=None) -> None:
    self._checkpointer.save(
      self._global_step(done),
      serialization.to_state_dict(state),
      {
        'position': dataclasses.asdict(done),
        'phase': (*phases.NAMES, _TRAINED)[done.phase],
        'has_gate': self._has_gate(done),
        'config': self._config,
        'num_images': self._num_images,
        'versions': hosts.versions(),
        **self._prediction_meta(),
      },
      scores,
    )

  def _prediction_meta(self) -> dict[str, Any]:
    """Returns what a `Predictor` needs to know beside the arrays."""
    experiment = self._experiment
    mean, std = data.channel_statistics(experiment.dataset)
    return {
      'model': experiment.model,
      'class_names': self._class_names,
      'image_size': experiment.dataset.image_size,
      'crop_ratio': experiment.dataset.crop_ratio,
      'interpolation': experiment.dataset.interpolation,
      'background': experiment.dataset.background,
      'mean': mean,
      'std': std,
      'gate_target': dataclasses.asdict(self._gate_target),
    }

  def _train_batches(self, position: Position):
    experiment, phase = self._experiment, phases.NAMES[position.phase]
    processes = dict(
      process_index=jax.process_index(), process_count=jax.process_count()
    )
    gate, dataset = experiment.gate, experiment.dataset
    if phase == 'calibrate':
      # More images tell more than the same ones again.
      dataset = dataclasses.replace(dataset, num_repeats=1)
    of_phase = {
      'supernet': dict(num_views=2 if experiment.supernet.multi_view else 1),
      'calibrate': {},
      'gate': dict(part=gate.part, is_augmented=gate.is_augmented),
    }
    return data.train_batches(
      dataset,
      **of_phase[phase],
      bad_images=self._bad_images,
      # Every phase has an order of its own.
      seed=experiment.seed * len(phases.NAMES) + position.phase,
      start_step=position.step,
      **processes,
    )

  def _eval_batches(self, part: str = 'test'):
    for batch in data.eval_batches(
      self._experiment.dataset,
      part,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      bad_images=self._bad_images,
    ):
      self._watchdog.reset()
      yield batch

  def _global_step(self, position: Position) -> int:
    before = self.phases[: position.phase]
    return sum(phase.num_steps for phase in before) + position.step

  def _has_gate(self, position: Position) -> bool:
    """Whether the last phase, the gate's, is over."""
    last = Position(len(self.phases) - 1, self.phases[-1].num_steps)
    return (position.phase, position.step) >= (last.phase, last.step)


class _Progress:
  """Scalars since the last row, and the pace."""

  # Enough for the device never to wait for the host, and few enough for
  # simulated devices not to run out of threads.
  _MAX_STEPS_IN_FLIGHT = 2

  def __init__(self, num_steps: int, batch_size: int):
    self._num_steps = num_steps
    self._batch_size = batch_size
    self.restart()

  def restart(self) -> None:
    """Leaves out of the pace what was done since the last row."""
    self._rows = []
    self._since = time.monotonic()

  def add(self, scalars) -> None:
    """Takes a step's scalars, which may still be on their way."""
    self._rows.append(scalars)
    if len(self._rows) > self._MAX_STEPS_IN_FLIGHT:
      jax.block_until_ready(self._rows[-1 - self._MAX_STEPS_IN_FLIGHT])

  def summary(self, step: int) -> dict[str, float]:
    """Returns the mean of each scalar over the steps that have it."""
    rows = jax.device_get(self._rows)
    pace = len(rows) / max(time.monotonic() - self._since, 1e-9)
    names = sorted({name for row in rows for name in row})
    means = {}
    for name in names:
      values = [float(row[name]) for row in rows if name in row]
      means[name] = sum(values) / len(values)
    self.restart()
    return {
      **means,
      'images_per_second': pace * self._batch_size,
      'eta_seconds': (self._num_steps - step) / pace,
    }


def _dataset_info(experiment: config_lib.Experiment) -> data.DatasetInfo:
  try:
    return data.dataset_info(experiment.dataset)
  except (ImportError, ValueError) as error:
    raise config_lib.ConfigError(str(error)) from error


def _local_path(workdir: str) -> pathlib.Path:
  """Returns the workdir; metrics are appended, which object stores can't."""
  if '://' in str(workdir):
    raise config_lib.ConfigError(
      f'--workdir={workdir}: expected a folder of a file system, which all'
      ' hosts share; mount the bucket (Cloud Storage FUSE does) and give its'
      ' path.'
    )
  return pathlib.Path(paths.expanded(workdir))
