"""An object in a process of its own that nothing was tuned in, as its users run it.

`set_up_process` changes the allocator of the whole process that it is called in, peers included.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any


class OwnProcess:
  """`make(*args)` in a new process; `call` runs a method there."""

  def __init__(self, make: Callable[..., Any], *args: Any):
    context = multiprocessing.get_context("spawn")
    self._pipe, other = context.Pipe()
    self._process = context.Process(target=_serve, args=(other, make, args), daemon=True)
    self._process.start()

  def call(self, method: str, *args: Any) -> tuple[Any, float]:
    """Its result, and the seconds that it took in there."""
    self._pipe.send((method, args))
    return self._pipe.recv()

  def close(self) -> None:
    self._pipe.send(None)
    self._process.join()


def _serve(pipe, make: Callable[..., Any], args: tuple) -> None:
  it = make(*args)
  while (message := pipe.recv()) is not None:
    method, args = message
    start = time.perf_counter()
    result = getattr(it, method)(*args)
    pipe.send((result, time.perf_counter() - start))
