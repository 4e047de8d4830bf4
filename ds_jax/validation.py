"""Checks of configs: one clear message for a value that can't be."""

from collections.abc import Sequence


def check_range(
  name: str,
  value: float,
  *,
  above: float | None = None,
  low: float | None = None,
  high: float | None = None,
  below: float | None = None,
) -> None:
  """Raises ValueError unless above < value < below, low <= value <= high."""
  limits = []
  if above is not None:
    limits.append((value > above, f'more than {above}'))
  if low is not None:
    limits.append((value >= low, f'at least {low}'))
  if high is not None:
    limits.append((value <= high, f'at most {high}'))
  if below is not None:
    limits.append((value < below, f'less than {below}'))
  if not all(holds for holds, _ in limits):
    expected = ' and '.join(text for _, text in limits)
    raise ValueError(f'{name}={value!r}: expected {expected}.')


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless the value is one of the choices."""
  if value not in choices:
    expected = ' or '.join(repr(choice) for choice in choices)
    raise ValueError(f'{name}={value!r}: expected {expected}.')
