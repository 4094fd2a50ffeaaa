"""Recent: results that several threads share, each made once."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent import futures
from typing import Any


class Recent:
  """The last few results of `make`, each made once even where many threads ask for it at once."""

  def __init__(self, make: Callable[[Any], Any], size: int):
    self._make, self._size = make, size
    self._lock = threading.Lock()
    self._results: collections.OrderedDict[Hashable, futures.Future] = collections.OrderedDict()

  def __call__(self, key: Hashable) -> Any:
    with self._lock:
      found = self._results.get(key)
      result = self._results[key] = found or futures.Future()
      self._results.move_to_end(key)
      if len(self._results) > self._size:
        self._results.popitem(last=False)
    if found is None:
      try:
        result.set_result(self._make(key))
      except BaseException as error:
        result.set_exception(error)  # Those who wait must not wait for ever.
    return result.result()
