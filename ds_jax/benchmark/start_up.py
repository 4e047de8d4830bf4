"""Times the first call of a fresh process, without and with a warm cache.

    python -m ds_jax.benchmark.start_up MODEL IMAGE_SIZE

MODEL being JSON for `create_model`, makes a Predictor, classifies an image and
prints the seconds that both took.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ds_jax import inference, models


def measure(model: Mapping[str, Any], image_size: int) -> dict[str, float]:
  """Returns seconds to the first answer, `cold` and `warm`.

  Args:
    model: arguments of `create_model`; JSON.
    image_size: in pixels.
  """
  arguments = [json.dumps(model), str(image_size)]
  command = [sys.executable, '-m', __name__, *arguments]
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


def _main(model, image_size) -> None:
  image_size = int(image_size)
  model = models.create_model(**json.loads(model))
  jax.block_until_ready(models.variables_of(model))
  image = np.zeros((1, image_size, image_size, 3), np.uint8)
  start = time.perf_counter()
  predictor = inference.Predictor(
    model, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3
  )
  predictor(image)
  print(time.perf_counter() - start)


if __name__ == '__main__':
  _main(*sys.argv[1:])
