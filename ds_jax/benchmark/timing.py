"""Times ways of doing something, in turn.

On a shared machine a time says little and a ratio within one run much: all ways
of a section run one after the other, again and again, and their medians are
compared.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_MIN_REPEATS, _MAX_REPEATS = 3, 100
# A turn of a fast way is so many seconds of calls: alone, its weights and code
# would be out of the caches each time.
_TURN = 0.05


@dataclasses.dataclass(frozen=True)
class Way:
  """Something to time.

  Attributes:
    section: ways of one section are timed in turn.
    name: what it is.
    batch_size: images in a call.
    madds: multiply-adds of an image; 0 where they say nothing.
    call: does it, and returns arrays that are waited for.
    reference: the name of the way, in its section and of its batch size, that
      it is compared with.
    num_batches: in a call.
  """

  section: str
  name: str
  batch_size: int
  madds: float
  call: Callable[[], Any]
  reference: str | None = None
  num_batches: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """A way, timed.

  Attributes:
    section: as of the way.
    name: as of the way.
    batch_size: as of the way.
    madds: as of the way.
    reference: as of the way.
    num_batches: as of the way.
    first_call: seconds; it traces and compiles.
    seconds: of a call, the mean of each turn.
  """

  section: str
  name: str
  batch_size: int
  madds: float
  reference: str | None
  num_batches: int
  first_call: float
  seconds: list[float]

  @property
  def median(self) -> float:
    """Seconds of a call."""
    return statistics.median(self.seconds)

  @property
  def spread(self) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, high = np.percentile(self.seconds, (25, 75))
    return float(high - low) / 2 / self.median

  @property
  def per_image(self) -> float:
    """Seconds of an image."""
    return self.median / (self.batch_size * self.num_batches)

  @property
  def madds_per_second(self) -> float:
    """Of all images together."""
    return self.madds / self.per_image


def time_in_turn(ways: Sequence[Way], seconds: float) -> list[Row]:
  """Times ways for about this long, first calls left out.

  Each way has a turn, again and again; see `_TURN`.
  """
  first = [_time(way, turn=0) for way in ways]
  rounds = []
  end = time.perf_counter() + seconds
  while len(rounds) < _MIN_REPEATS or (
    len(rounds) < _MAX_REPEATS and time.perf_counter() < end
  ):
    rounds.append([_time(way, _TURN) for way in ways])
  return [
    Row(
      way.section,
      way.name,
      way.batch_size,
      float(way.madds),
      way.reference,
      way.num_batches,
      compiling,
      list(times),
    )
    for way, compiling, times in zip(
      ways, first, zip(*rounds, strict=True), strict=True
    )
  ]


def ratio(rows: Sequence[Row], above: str, below: str) -> dict[int, float]:
  """Returns, by batch size, the time of one way over that of another."""
  median = {(row.name, row.batch_size): row.median for row in rows}
  return {
    batch_size: seconds / median[below, batch_size]
    for (name, batch_size), seconds in median.items()
    if name == above and (below, batch_size) in median
  }


def _time(way: Way, turn: float) -> float:
  """Returns a call's seconds, of calls for at least so long."""
  calls, start = 0, time.perf_counter()
  while True:
    jax.block_until_ready(way.call())
    calls += 1
    taken = time.perf_counter() - start
    if taken >= turn:
      return taken / calls
