"""SIGTERM: a request to stop, obeyed at once or when the step at hand is saved."""

from __future__ import annotations

import signal


class Terminated(BaseException):
  """SIGTERM came, and nothing is half done; as KeyboardInterrupt, it is no error that code may
  survive by `except Exception`, which libraries write around what they can go on without.
  """


class Termination:
  """While open, SIGTERM raises Terminated(`sentence`), or once `deferred` only sets `requested`."""

  def __init__(self, sentence: str = "stopped by SIGTERM before the first step"):
    self.sentence = f"{sentence}; the same command begins anew"
    self.deferred = False
    self.requested = False

  def __enter__(self) -> Termination:
    self._before = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, kind, value, trace) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def agreed(self, *, now: bool) -> bool:
    """Whether SIGTERM came to any process; several agree on it where all say `now`."""
    import jax  # Not by binaries that compute nothing.
    import numpy as np

    from gemjax.parallel.arrays import of_all_processes

    if jax.process_count() == 1:
      return self.requested
    return now and bool(of_all_processes(np.array([self.requested])).any())

  def _request(self, signum, frame) -> None:
    del signum, frame
    self.requested = True
    if not self.deferred:
      raise Terminated(self.sentence)
