"""Times of functions, taken side by side so that their ratio means something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def side_by_side(fns: Mapping[str, Callable[[], Any]], repeats: int = 7) -> dict[str, float]:
  """Median seconds of every function, called in turns; the first call of each is not counted."""
  seconds = {name: [] for name in fns}
  for turn in range(repeats + 1):
    for name, fn in fns.items():
      start = time.perf_counter()
      jax.block_until_ready(fn())
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(s) for name, s in seconds.items()}
