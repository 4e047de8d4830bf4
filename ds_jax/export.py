"""Exports a routed network, or one sub-network, to a file; reads it again.

python -m ds_jax.export --workdir=runs/digits --output=digits.ds
python -m ds_jax.export --workdir=runs/digits --output=small.ds --subnet=0
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ds_jax import checkpoint, inference, paths
from ds_jax.inference.export import PLATFORMS, Exported, load, save

__all__ = ['PLATFORMS', 'Exported', 'load', 'main', 'save']

_EXPECTED = (ImportError, OSError, ValueError, checkpoint.CheckpointError)


def main(argv: Sequence[str] | None = None) -> None:
  """Exports a run, or a conversion."""
  parser = argparse.ArgumentParser(prog='python -m ds_jax.export')
  parser.add_argument('--workdir', required=True, help='a run, to its end')
  parser.add_argument('--output', required=True, help='the file to write')
  parser.add_argument('--batch_size', type=int, default=1)
  parser.add_argument('--platform', choices=PLATFORMS)
  parser.add_argument(
    '--fraction', type=float, help='budget, of the largest bucket'
  )
  parser.add_argument('--router', choices=('gate', 'cascade'), default='gate')
  parser.add_argument(
    '--subnet', type=int, help='this sub-network alone, without a router'
  )
  parser.add_argument(
    '--shared_weights',
    action='store_true',
    help='store the weights once, and slice them in every call',
  )
  options = parser.parse_args(argv)
  if options.fraction is None and options.router != 'gate':
    parser.error(f'--router={options.router} needs a budget: --fraction=0.4')
  if options.fraction is not None and options.subnet is not None:
    parser.error(
      '--subnet is one sub-network, which has no budget: leave out'
      ' --fraction, or --subnet.'
    )
  try:
    _export(options)
  except _EXPECTED as error:
    sys.exit(f'{type(error).__name__}: {error}')
  size = os.path.getsize(paths.expanded(options.output))
  print(f'{options.output}: {size / 1e6:.1f} MB, batch {options.batch_size}')


def _export(options):
  predictor = inference.Predictor.restore(
    options.workdir, presliced=not options.shared_weights
  )
  if options.fraction is not None:
    predictor = predictor.with_budget(
      fraction=options.fraction, router=options.router
    )
  save(
    predictor,
    options.output,
    batch_size=options.batch_size,
    platform=options.platform,
    subnet=options.subnet,
  )


if __name__ == '__main__':
  main()
