"""An object in a process of its own, as its users run it, or with the allocator of our binaries.

`set_up_process` changes the allocator of the whole process that it is called in, peers included.
And a peer in our process would share our heap and leave its threads spinning beside our step.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from gemjax.parallel.process import set_up_process


class OwnProcess:
  """`make(*args)` in a new process, `tuned` as ours or plain; `call` runs a method there."""

  def __init__(self, make: Callable[..., Any], *args: Any, tuned: bool = False):
    context = multiprocessing.get_context("spawn")
    self._pipe, other = context.Pipe()
    self._process = context.Process(target=_serve, args=(other, make, args, tuned), daemon=True)
    self._process.start()

  def call(self, method: str, *args: Any) -> tuple[Any, float]:
    """Its result, and the seconds that it took in there."""
    self._pipe.send((method, args))
    return self._pipe.recv()

  def close(self) -> None:
    self._pipe.send(None)
    self._process.join()


def _serve(pipe, make: Callable[..., Any], args: tuple, tuned: bool) -> None:
  if tuned:
    set_up_process()
  it = make(*args)
  while (message := pipe.recv()) is not None:
    method, args = message
    start = time.perf_counter()
    result = getattr(it, method)(*args)
    pipe.send((result, time.perf_counter() - start))
