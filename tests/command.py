"""`python -m ds_jax.main` on the micro experiment, in processes of its own."""

import json
import os
import pathlib
import subprocess
import sys
import time

_REPOSITORY = pathlib.Path(__file__).parents[1]


def rows(workdir):
  """What `metrics.jsonl` holds."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  found = []
  for line in lines:
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:  # cut off by a kill, or not yet whole
      continue
  return found


class Command:
  """The command, started."""

  def __init__(self, images, workdir, *arguments, **environment):
    environment = {**os.environ, **environment}
    self.workdir = workdir
    self._process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'ds_jax.main'),
        *('--config=tests/micro.py', f'--workdir={workdir}'),
        f'--config.dataset.name={images}',
        *arguments,
      ],
      cwd=_REPOSITORY,
      env={k: v for k, v in environment.items() if v is not None},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def wait_for(self, phase, count, timeout=500):
    """Returns once `count` more rows of a phase were written."""
    before = len(rows(self.workdir))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
      new = rows(self.workdir)[before:]
      if sum(row['phase'] == phase for row in new) >= count:
        return
      assert self._process.poll() is None, self.finish()
      time.sleep(0.001)
    raise AssertionError(f'No {count} steps of {phase} in {timeout} s.')

  def send_signal(self, number):
    self._process.send_signal(number)

  def finish(self, timeout=500):
    """Waits, and returns the exit status and all output."""
    output, _ = self._process.communicate(timeout=timeout)
    return self._process.returncode, output
