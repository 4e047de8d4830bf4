"""Times the first call of a fresh process, without and with a warm cache.

    python -m ds_jax.benchmark.start_up MODEL NUM_CLASSES IMAGE_SIZE BATCH_SIZE

makes a Predictor, classifies a batch and prints the seconds that both took.
"""

import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from ds_jax import models, predict


def measure(
  name: str, num_classes: int, image_size: int, batch_size: int
) -> dict[str, float]:
  """Returns seconds to the first answer, `cold` and `warm`."""
  arguments = [name, num_classes, image_size, batch_size]
  command = [sys.executable, '-m', __name__, *map(str, arguments)]
  with tempfile.TemporaryDirectory() as cache:
    environment = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

    def run():
      done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
      )
      return float(done.stdout.split()[-1])

    return {'cold': run(), 'warm': run()}


def _main(name, num_classes, image_size, batch_size) -> None:
  image_size, batch_size = int(image_size), int(batch_size)
  model = models.create_model(
    name, int(num_classes), **models.size_options(name, image_size)
  )
  jax.block_until_ready(models.variables_of(model))
  images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
  start = time.perf_counter()
  predictor = predict.Predictor(
    model, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3
  )
  predictor(images)
  print(time.perf_counter() - start)


if __name__ == '__main__':
  _main(*sys.argv[1:])
