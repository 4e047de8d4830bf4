"""Trains, resumes, evaluates and measures.

    python -m ds_jax.main --config=configs/ds_digits.py --workdir=runs/digits

Run again, the same command resumes where it was. Any field in the
file is changed with a flag like `--config.gate.num_epochs=5`.
"""

import logging as python_logging
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ds_jax import checkpoint, data, host
from ds_jax.benchmark import command
from ds_jax.train import experiment, loop

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'An experiment: a file of configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and results go.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate', 'benchmark'], 'What to do.'
)

# Mistakes whose message says it all. Anything else keeps its traceback.
_PLAIN_ERRORS = (
  experiment.ConfigError,
  checkpoint.CheckpointError,
  data.DatasetNotFoundError,
  loop.NonFiniteError,
)


def main(argv):
  """Runs the chosen mode; a plain error ends with its message and status 1."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  logging.get_absl_handler().addFilter(_is_our_own)
  host.keep_freed_memory()
  _cache_programs(_WORKDIR.value)
  modes = {
    'train': loop.train,
    'evaluate': loop.evaluate_only,
    'benchmark': _benchmark,
  }
  try:
    modes[_MODE.value](_CONFIG.value, _WORKDIR.value)
  except loop.Preempted as preempted:
    logging.info('%s', preempted)
  except _PLAIN_ERRORS as error:
    sys.exit(f'{type(error).__name__}: {error}')


def _cache_programs(workdir):
  """Keeps compiled programs in the workdir, so that resuming starts fast."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = checkpoint.absolute(workdir) / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _benchmark(config, workdir):
  """Times the finished run, and writes `benchmark.json` in its workdir."""
  del config
  path = pathlib.Path(workdir) / 'benchmark.json'
  command.run(command.Options(workdir=workdir, json=str(path)))


def _is_our_own(record: python_logging.LogRecord) -> bool:
  """Orbax logs some twenty lines a save at INFO, through the same logger."""
  return record.levelno > python_logging.INFO or 'orbax' not in record.pathname


def _parse_flags(argv):
  """Parses the command line; a field that the config lacks is a plain error."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError) as error:
    return sys.exit(f'Bad --config, or --config.FIELD=VALUE: {error}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  flags.FLAGS.set_default('verbosity', logging.INFO)
  app.run(main, flags_parser=_parse_flags)
