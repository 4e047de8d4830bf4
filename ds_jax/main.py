"""Trains, resumes, evaluates and measures.

    python -m ds_jax.main --config=configs/ds_digits.py --workdir=runs/digits

Run again, the same command resumes where it was. Any field, in the file or not,
is set with a flag like `--config.gate.num_epochs=5`; `--print_config` prints
them all, and ends. A config that comes with ds_jax is found by its name, as in
`--config=ds_digits`.

On several hosts the same command runs on each, and JAX finds the others by
itself on Cloud TPU, GKE, SLURM and Open MPI. Elsewhere each is told by
`--coordinator_address`, `--num_processes` and `--process_id`.
"""

import logging as python_logging
import os
import sys
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ds_jax import checkpoint, command_line, config, cpu, data, hosts, paths
from ds_jax.train import loop

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'An experiment: a file of configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and results go.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate', 'benchmark'], 'What to do.'
)
_PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print every field of the experiment, and end.'
)

_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of process 0, of several.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this one is.', lower_bound=0
)

# Mistakes whose message says it all. Anything else keeps its traceback.
_PLAIN_ERRORS = (
  config.ConfigError,
  checkpoint.CheckpointError,
  data.DatasetNotFoundError,
  data.ImageError,
  hosts.HostError,
  loop.NonFiniteError,
  OSError,
)


def main(argv):
  """Runs the chosen mode; a plain error ends with its message and status 1."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  logging.get_absl_handler().addFilter(_is_our_own)
  if _PRINT_CONFIG.value:
    _print_config(_CONFIG.value)
    return
  if _WORKDIR.value is None:
    raise app.UsageError('--workdir is missing: where is the run to go?')
  cpu.keep_freed_memory()
  modes = {
    'train': loop.train,
    'evaluate': loop.evaluate_only,
    'benchmark': _benchmark,
  }
  try:
    _join_processes(_CONFIG.value)
    _cache_programs(_WORKDIR.value)
    modes[_MODE.value](_CONFIG.value, _WORKDIR.value)
  except loop.Preempted as preempted:
    logging.info('%s', preempted)
  except _PLAIN_ERRORS as error:
    _fail(f'{type(error).__name__}: {error}')
  except (Exception, KeyboardInterrupt) as error:
    if not jax.distributed.is_initialized():
      raise
    _fail(hosts.explain(error))


def _print_config(given):
  try:
    experiment = config.Experiment.from_config(given)
  except config.ConfigError as error:
    sys.exit(f'ConfigError: {error}')
  print(command_line.listing(experiment))


def _join_processes(given):
  parallel = config.Experiment.from_config(given).parallel
  hosts.initialize(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    heartbeat_seconds=parallel.heartbeat_seconds,
  )


def _fail(message):
  """Ends with status 1, at once: a usual exit would wait for the others."""
  if not jax.distributed.is_initialized():
    sys.exit(message)
  print(message, file=sys.stderr, flush=True)
  if jax.process_index() == 0:
    # The others end with it, and may have something to say, too.
    time.sleep(2)
  os._exit(1)


def _cache_programs(workdir):
  """Keeps compiled programs in the workdir, so that resuming starts fast."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = paths.expanded(workdir) / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _benchmark(given, workdir):
  """Times the finished run, and writes `benchmark.json` in its workdir."""
  del given
  # Imported here: training needs none of it.
  from ds_jax.benchmark import command

  path = paths.expanded(workdir) / 'benchmark.json'
  command.run(command.Options(workdir=workdir, json=str(path)))


def _is_our_own(record: python_logging.LogRecord) -> bool:
  """Orbax logs some twenty lines a save at INFO, through the same logger."""
  return record.levelno > python_logging.INFO or 'orbax' not in record.pathname


def _parse_flags(argv):
  """Parses the command line; a wrong field or value is a plain error."""
  argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  try:
    argv, fields = command_line.split_arguments(argv)
    # Where `config_flags` looks for fields by itself.
    sys.argv = command_line.found(argv)
    rest = app.parse_flags_with_usage(sys.argv)
    if fields and _CONFIG.value is not None:
      command_line.override(_CONFIG.value, fields)
  except config.ConfigError as error:
    sys.exit(f'ConfigError: {error}')
  except (AttributeError, KeyError, TypeError) as error:
    sys.exit(f'Bad --config: {error}')
  return rest


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  flags.FLAGS.set_default('verbosity', logging.INFO)
  app.run(main, flags_parser=_parse_flags)
