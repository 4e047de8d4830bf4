"""Times a trained run's routers on its own test images."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from ds_jax import checkpoint, data, inference, routing
from ds_jax import config as config_lib
from ds_jax.benchmark import timing

# Shares of the largest bucket's MAdds.
_BUDGETS = (0.4, 0.6, 0.8)
_ROUTERS = ('gate', 'cascade')


def router_ways(
  predictor: inference.Predictor, images: np.ndarray, batch_size: int
) -> list[timing.Way]:
  """Buckets and routers on the same images.

  Args:
    predictor: of a run with held-out images, to set budgets on.
    images: (N, S, S, 3) uint8, of the predictor's size.
    batch_size: images in a batch; whole batches are timed, all in one call.
  """
  num_batches = max(len(images) // batch_size, 1)
  images = images[: num_batches * batch_size]
  batches = np.split(images, num_batches)
  on_device = [jax.device_put(batch) for batch in batches]
  buckets = predictor.costs.indices

  def way(name, program, madds):
    def call():
      return [program(batch) for batch in on_device]

    return timing.Way(
      'routers', name, len(batches[0]), madds, call, f'bucket {buckets[-1]}',
      num_batches,
    )  # fmt: skip

  ways = []
  for bucket in buckets:
    madds = predictor(images[:1], subnet=bucket).madds.mean()
    ways.append(way(f'bucket {bucket}', predictor.program(bucket), madds))
  for name, routed in _routed(predictor).items():
    spent = [routed(batch).madds for batch in batches]
    madds = np.concatenate(spent).mean()
    ways.append(way(name, routed.program(), madds))
  return ways


def _routed(predictor) -> dict[str, inference.Predictor]:
  """The router of the run, and those of some budgets."""
  routed = {"the run's gate": predictor}
  for router in _ROUTERS:
    for budget in _BUDGETS:
      try:
        routed[f'{router} at {budget:.0%}'] = predictor.with_budget(
          fraction=budget, router=router
        )
      except routing.BudgetError:  # Below the narrowest bucket's cost.
        continue
  return routed


@functools.cache
def dataset_of(workdir: str) -> config_lib.DataConfig:
  """Returns the run's own data set."""
  meta = checkpoint.restore(checkpoint.directory_of(workdir)).meta
  return config_lib.DataConfig(**meta['config']['dataset'])


def test_images(workdir: str, count: int) -> np.ndarray:
  """Returns the first test images of the run's own data set."""
  config = dataset_of(workdir)
  batches = data.eval_batches(config)
  images: Sequence[np.ndarray] = []
  for batch in batches:
    images = [*images, *batch['images'][batch['mask']]]
    if len(images) >= count:
      break
  batches.close()
  return np.stack(images[:count])
