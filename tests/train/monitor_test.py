"""Where a run's time goes, traces, and steps that stall."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from ds_jax import config as config_lib
from ds_jax.train import monitor


@pytest.fixture
def clock():
  clock = monitor.Clock()
  yield clock
  clock.close()


def test_shares_add_up_to_the_time_since_the_last_reading(clock):
  with clock.spent_on('data'):
    time.sleep(0.05)
  with clock.spent_on('save'):
    time.sleep(0.1)
  shares = clock.read()
  assert sum(shares.values()) == pytest.approx(1)
  assert shares['share/save'] > shares['share/data'] > 0
  assert shares['share/evaluate'] == shares['share/compile'] == 0
  assert clock.read()['goodput'] == pytest.approx(1)


def test_compiling_counts_as_that_wherever_it_happens(clock):
  with clock.spent_on('evaluate'):
    jax.jit(lambda x: jnp.linalg.qr(x @ x.T))(jnp.ones((3, 5)))
  shares = clock.read()
  assert shares['share/compile'] > 0
  assert sum(shares.values()) == pytest.approx(1)
  assert min(shares.values()) >= 0


def test_a_closed_clock_no_longer_listens():
  clock = monitor.Clock()
  clock.close()
  jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
  assert clock.read()['share/compile'] == 0


_STALLS = """
import sys, time
from ds_jax.train import monitor
watchdog = monitor.Watchdog(float(sys.argv[1]))
def stalls():
  time.sleep(0.5)
stalls()
watchdog.reset()
watchdog.close()
time.sleep(0.3)
print('closed', file=sys.stderr)
"""


def _stalls(seconds):
  """What a process that does nothing for half a second says, and how often."""
  done = subprocess.run(
    [sys.executable, '-c', _STALLS, seconds],
    capture_output=True, check=True, text=True,
  )  # fmt: skip
  *reports, after = done.stderr.split('Timeout')
  return reports, after


def test_a_stall_is_reported_with_all_stacks_and_no_more_once_closed():
  reports, after = _stalls('0.2')
  assert len(reports) == 2
  assert 'in stalls' in after
  assert after.endswith('closed\n')


def test_a_watchdog_that_is_off_says_nothing():
  assert _stalls('0') == ([], 'closed\n')


def _run(config, folder, steps):
  profile = monitor.Profile(config, folder)
  for step in steps:
    with profile.step(step):
      jax.block_until_ready(jnp.ones(3) + step)
  profile.close()
  return list(folder.rglob('*.xplane.pb'))


def test_a_trace_is_taken_of_the_steps_that_are_named(tmp_path):
  config = config_lib.MonitorConfig(profile_step=2, profile_steps=2)
  assert len(_run(config, tmp_path / 'one', range(5))) == 1
  # One that the run ends in is whole, too; and one that came before is not.
  assert len(_run(config, tmp_path / 'two', range(3))) == 1
  assert not _run(config, tmp_path / 'three', range(3, 6))


def test_no_trace_without_a_step(tmp_path):
  assert not _run(config_lib.MonitorConfig(), tmp_path, range(3))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'profile_steps': 0}, 'profile_steps=0: expected at least 1'),
    ({'profile_step': -1}, 'profile_step=-1: expected at least 0'),
    ({'watchdog_seconds': -1.0}, 'watchdog_seconds=-1.0: expected at least 0'),
  ],
)
def test_a_wrong_config_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    config_lib.MonitorConfig(**options)
