"""Ahead-of-time compilation, one program a set of shapes."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from gemjax.parallel.arrays import after_first_process
from gemjax.train.executables import Executable, Executables

_NOTICED = 1.0  # Seconds that a run stands still without a person asking why.


class Compiled:
  """A jitted function whose compilations are counted and timed, and kept for the next start.

  Jagged batches come in a few capacities; each new one is a compilation, which a user should see.
  Of several processes the first compiles, and the others load what it has kept; they compile, too,
  where they cannot see it.

  Args:
    name: Of the program, among the `executables`.
    function: Of arguments whose shapes follow from those named by `varying`.
    executables: Of this run.
    varying: Positions of the arguments that come in several shapes.
    donate: Positions of the arguments that are overwritten.
    out_shardings: Where the results lie.
  """

  def __init__(
    self,
    name: str,
    function: Callable,
    executables: Executables,
    *,
    varying: tuple[int, ...] = (),
    donate: tuple[int, ...] = (),
    out_shardings: Any = None,
  ):
    self._name, self._executables, self._varying = name, executables, varying
    self.jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
    self._programs: dict[Any, Executable] = {}
    self.seconds = 0.0

  @property
  def compilations(self) -> int:
    return len(self._programs)

  def __call__(self, *args: Any) -> Any:
    varying = tuple(args[i] for i in self._varying)
    return self.prepare(varying, lambda: args).call(*args)

  def prepare(self, varying: tuple, args: Callable[[], tuple]) -> Executable:
    """Loads or compiles the program of these `varying` arguments; nothing runs.

    Args:
      varying: Arguments, or their `jax.ShapeDtypeStruct`.
      args: Gives all arguments, or theirs, if they must be known.
    """
    key = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(varying))
    if key not in self._programs:
      start = time.perf_counter()
      self._programs[key] = self._made(key, args)
      self.seconds += (seconds := time.perf_counter() - start)
      if self.compilations > 1 and seconds > _NOTICED:
        self._executables.say(
          f"batches of other sizes: program {self.compilations} of {self._name} was ready after "
          f"{seconds:.1f} s"
        )
    return self._programs[key]

  def _made(self, key: Any, args: Callable[[], tuple]) -> Executable:
    def make() -> Executable:
      if loaded := self._executables.load(self._name, key):
        return loaded
      with _without_collection():
        lowered = self.jitted.lower(*args())
      return self._executables.compile(self._name, key, lowered)

    return after_first_process(self._name, make)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
  """Tracing makes millions of objects that stay, a fifth of whose time Python looks for cycles."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()
