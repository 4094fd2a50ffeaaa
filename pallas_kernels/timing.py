"""Times of functions, taken side by side so that their ratio means something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]


def side_by_side(fns: Mapping[str, Call], repeats: int = 7) -> dict[str, float]:
  """Median seconds of every function, called in turns; the first call of each is not counted.

  On a GPU a turn is ten calls, of which each is sent while the one before runs.
  """
  calls = 10 if jax.default_backend() == "gpu" else 1
  seconds = {name: [] for name in fns}
  for turn in range(repeats + 1):
    for name, fn in fns.items():
      start = time.perf_counter()
      for _ in range(calls):
        found = fn()
      jax.block_until_ready(found)
      if turn:
        seconds[name].append((time.perf_counter() - start) / calls)
  return {name: statistics.median(s) for name, s in seconds.items()}


def beside(ours: Callable[[str], Call], theirs: Call, repeats: int = 41) -> dict[str, float]:
  """Milliseconds of `ours(implementation)` and of `theirs`, side by side: columns of the bench.

  The XLA form everywhere, the Triton kernel where there is a GPU.
  """
  names = ("xla", "triton") if jax.default_backend() == "gpu" else ("xla",)
  calls = {name: ours(name) for name in names} | {"padded": theirs}
  ms = {name: 1e3 * s for name, s in side_by_side(calls, repeats).items()}
  speeds = {f"{name}_over_padded_speed": ms["padded"] / ms[name] for name in names}
  return {f"{name}_ms": x for name, x in ms.items()} | speeds
