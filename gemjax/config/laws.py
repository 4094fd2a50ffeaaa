"""Laws that several fields obey; each raises ConfigError that names the field."""

import math

from gemjax.fields import need


def real(value: float, low: float = 0.0, high: float = math.inf) -> bool:
  """Whether a number is finite and within [low, high]."""
  return math.isfinite(value) and low <= value <= high


def one_of(value: str, field: str, *allowed: str) -> None:
  need(value in allowed, field, value, f"one of {', '.join(allowed)}")


def widths(value: tuple[int, ...], field: str) -> None:
  need(all(v > 0 for v in value), field, value, "a tuple of positive widths")
