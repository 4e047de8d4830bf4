"""Any number of images in batches of a few sizes, since each size compiles.

Axes: N images, B of a batch.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from typing import Any

import jax
import numpy as np

# Of a batch. More would take more memory, and no less time for an image.
LIMIT = 256
# Batches on the device at a time, since the host prepares the next meanwhile.
_UNDER_WAY = 2


class Sizes:
  """The sizes that have run, of every program. Threads may share it."""

  def __init__(self):
    self._known: dict[Hashable, frozenset[int]] = {}
    self._compiling = threading.Lock()

  def plan(self, program: Hashable, count: int) -> list[int]:
    """Returns the sizes of the batches for some images; see `split`."""
    return split(count, self._known.get(program, frozenset()))

  def run(self, program: Hashable, size: int, call: Callable[[], Any]) -> Any:
    """Calls; the first call of a size alone, so that it compiles once."""
    if size in self._known.get(program, ()):
      return call()
    with self._compiling:
      result = call()
      # A new set, which those who read it need no lock for.
      known = self._known.get(program, frozenset())
      self._known[program] = known | {size}
      return result


def split(count: int, known: Set[int]) -> list[int]:
  """Returns sizes of batches that hold so many images.

  All but the last one or two are of `LIMIT`. The rest goes into the next power
  of two; or, where that would not be full and has not run yet, into two batches
  of the one before, if that has.

  Args:
    count: of the images, at least 1.
    known: sizes that need no compilation.
  """
  whole, rest = divmod(count, LIMIT)
  sizes = [LIMIT] * whole
  if not rest:
    return sizes
  size = 1 << (rest - 1).bit_length()
  if rest < size and size not in known and size // 2 in known:
    return [*sizes, size // 2, size // 2]
  return [*sizes, size]


def padded(images: np.ndarray, size: int) -> np.ndarray:
  """Returns images (B, ...) of which the last repeat the first."""
  missing = size - len(images)
  if not missing:
    return images
  return np.concatenate([images, images[:1].repeat(missing, axis=0)])


def run(
  items: Sequence[Any],
  sizes: Sequence[int],
  prepare: Callable[[Sequence[Any]], np.ndarray],
  call: Callable[[np.ndarray], Any],
) -> Any:
  """Runs all items, in batches of these sizes.

  Args:
    items: N.
    sizes: of the batches; the last holds what is left.
    prepare: some of the items to images.
    call: a batch (B, ...) to a tree of arrays (B, ...), still on their way.

  Returns:
    The tree, of arrays (N, ...), on the host.
  """
  results, done = [], []
  for start, size in _starts(sizes):
    images = prepare(items[start : start + size])
    results.append(call(padded(images, size)))
    if len(results) == _UNDER_WAY:
      done.append(jax.device_get(results.pop(0)))
  done += jax.device_get(results)
  joined = jax.tree.map(lambda *parts: np.concatenate(parts), *done)
  return jax.tree.map(lambda array: array[: len(items)], joined)


def _starts(sizes) -> Iterator[tuple[int, int]]:
  start = 0
  for size in sizes:
    yield start, size
    start += size
