"""Trains, resumes and evaluates.

    python -m ds_jax.main --config=configs/ds_digits.py --workdir=runs/digits

Run again, the same command resumes where it was. A field of the config is
changed with `--config.gate.num_epochs=5`.
"""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from ds_jax import checkpoint, data
from ds_jax.train import loop

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'An experiment: a file of configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and results go.'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'What to do.')

# Mistakes of the user's and of the machine's, whose message says it all.
_PLAIN_ERRORS = (
  ValueError,
  checkpoint.CheckpointError,
  data.DatasetNotFoundError,
  loop.NonFiniteError,
)


def main(argv):
  """Runs the chosen mode; a plain error ends with its message and status 1."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_our_own)
  modes = {'train': loop.train, 'evaluate': loop.evaluate_only}
  try:
    modes[_MODE.value](_CONFIG.value, _WORKDIR.value)
  except loop.Preempted as preempted:
    logging.info('%s', preempted)
  except _PLAIN_ERRORS as error:
    logging.debug('', exc_info=True)
    sys.exit(f'{type(error).__name__}: {error}')


def _is_our_own(record: python_logging.LogRecord) -> bool:
  """Orbax logs some twenty lines a save at INFO, through the same logger."""
  return record.levelno > python_logging.INFO or 'orbax' not in record.pathname


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
