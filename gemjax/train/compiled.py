"""Ahead-of-time compilation, one program a set of shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
  """A jitted function whose compilations are counted and timed.

  Jagged batches come in a few capacities; each new one is a compilation, which a user should see.
  """

  def __init__(
    self, function: Callable, *, donate: tuple[int, ...] = (), out_shardings: Any = None
  ):
    self._jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
    self._programs: dict[Any, jax.stages.Compiled] = {}
    self.seconds = 0.0

  @property
  def compilations(self) -> int:
    return len(self._programs)

  def __call__(self, *args: Any) -> Any:
    key = tuple(x.shape for x in jax.tree.leaves(args[1:]))  # The state comes first.
    if key not in self._programs:
      start = time.perf_counter()
      self._programs[key] = self._jitted.lower(*args).compile()
      self.seconds += time.perf_counter() - start
    return self._programs[key](*args)
