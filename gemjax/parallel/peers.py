"""The processes of a run watch each other, so that one that dies or stalls stops all, by its name.

Every process but the first keeps one connection to the first, and tells it every second where it
is: its phase, and how many phases it has begun. All processes of a run begin the same phases in
the same order, so that whoever has begun the fewest is the one for whom the others wait.

  a process dies       its kernel hangs up: the others stop at once
  it fails             it says why; the others stop once it hangs up, so that its message is first
  it is silent         for SILENT_SECONDS, or `stall_seconds` if fewer: its host is gone, or stopped
  it stalls            no new phase for `stall_seconds`

The first process judges and tells all; the others judge only the first. A process that has to stop
prints one sentence and ends with code 1, from a thread: its main thread waits in a collective that
will never end. JAX's own heartbeats (100 s, then an abort that names no host) stay behind this.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from gemjax.parallel.connection import Connection
from gemjax.parallel.place import Place

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0
FAREWELL_SECONDS = 5.0  # How long a failed process may take from saying why to its end.
T = TypeVar("T")

# Whom this process has told of its failure. It must not wait for JAX's farewell then: the first one
# would wait 100 s for those that have stopped.
TOLD: list[Peers] = []


class _At(NamedTuple):
  """Where a process is."""

  begun: int = 0  # Phases.
  phase: str = "start"
  endless: bool = True  # The phase may last for minutes or hours: imports, preparing of data.
  ended: bool = False
  failure: str = ""  # Why it ended.


class _Process:
  """What is known of one process; without a connection it is this one."""

  def __init__(self, name: str, connection: Connection | None = None):
    self.name, self.connection = name, connection
    self.at, self.since = _At(), time.monotonic()

  def update(self, at: _At) -> None:
    self.at, self.since = at, time.monotonic()


class Peers:
  """The processes of a run, as one of them knows them; a process that is alone watches nobody.

  A context: an error that leaves it is told to the others, who then stop, too.
  """

  def __init__(
    self,
    place: Place | None = None,
    connections: Mapping[int, Connection] | None = None,
    hosts: Mapping[int, str] | None = None,
    *,
    stall_seconds: float = 600.0,
  ):
    place, hosts = place or Place(), hosts or {}
    self.index = place.index
    self._stall_seconds = stall_seconds
    self._silent_seconds = min(SILENT_SECONDS, stall_seconds)
    self._self = _Process(place.name(place.index, hosts.get(place.index, "")))
    self._others = [
      _Process(place.name(i, hosts.get(i, "")), c) for i, c in (connections or {}).items()
    ]
    self._agreed = False
    if self._others:
      threading.Thread(target=self._watch, name="peers", daemon=True).start()

  def phase(self, name: str, *, endless: bool = False) -> None:
    """This process begins a phase, as all others do; an `endless` one never counts as stalled."""
    self._self.update(_At(self._self.at.begun + 1, name, endless))

  def phases(self, name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; a phase each, as all processes have equally many."""
    for item in items:
      self.phase(name)
      yield item

  def agree_to_end(self) -> None:
    """All processes will end now by themselves: the error by which this one does stops nobody."""
    self._agreed = True

  def __enter__(self) -> Peers:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace) -> None:
    if not self._others:
      return
    if kind is not None and not self._agreed and _may_be_an_echo(kind):
      time.sleep(2 * FAREWELL_SECONDS)  # A collective failed: let the watch say whose fault it was.
    reason = "" if kind is None or self._agreed else f"{error}" or kind.__name__
    self._self.at = self._self.at._replace(ended=True, failure=" ".join(reason.split()))
    self._tell(self._self.at._asdict())
    if reason:
      TOLD.append(self)

  def leave(self) -> None:
    """Behind a failure that was told, and behind its message: the others stop. The first process
    goes last, as JAX's coordinator is in it: without it they would be aborted, perhaps before they
    have said why.
    """
    for process in self._others:
      process.connection.hang_up()
    until = time.monotonic() + FAREWELL_SECONDS
    with selectors.DefaultSelector() as selector:
      for connection in (p.connection for p in self._others if self.index == 0):
        selector.register(connection.socket, selectors.EVENT_READ, connection)
      while selector.get_map() and time.monotonic() < until:
        for key, _ in selector.select(0.1):
          key.data.receive()
          if key.data.closed:
            selector.unregister(key.fileobj)

  def _watch(self) -> None:
    heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
      for process in self._others:
        selector.register(process.connection.socket, selectors.EVENT_READ, process)
      while selector.get_map():
        for key, _ in selector.select(BEAT_SECONDS):
          process: _Process = key.data
          for line in process.connection.receive():
            self._hear(process, line)
          if process.connection.closed:
            selector.unregister(process.connection.socket)
        if (now := time.monotonic()) - heard > BEAT_SECONDS and not self._self.at.failure:
          heard = now
          self._tell(self._self.at._asdict())
        if sentence := self._verdict(now):
          self._stop(sentence)

  def _hear(self, process: _Process, line: dict[str, Any]) -> None:
    if "verdict" in line:
      self._stop(line["verdict"])
    at = _At(**line)
    if at != process.at:
      process.update(at)

  def _tell(self, line: dict[str, Any]) -> None:
    for process in self._others:
      if not process.connection.closed:
        process.connection.send(**line)

  def _verdict(self, now: float) -> str:
    """Why the run cannot go on; empty where it can."""
    for process in self._others:
      at, where = process.at, f"last in phase {process.at.phase!r}"  # By its last line.
      gone = process.connection.closed
      if at.failure and (gone or now - process.since > FAREWELL_SECONDS):
        return f"{process.name} failed in phase {at.phase!r}: {at.failure}"
      if gone and not at.ended:
        return f"{process.name} died, {where}"
      if not gone and now - process.connection.heard > self._silent_seconds:
        return f"{process.name} has been silent for {self._silent_seconds:g} s, {where}"
    return self._stalled(now) if self.index == 0 else ""

  def _stalled(self, now: float) -> str:
    every = [p for p in (self._self, *self._others) if not p.at.ended]
    if not every or now - min(p.since for p in every) < self._stall_seconds:
      return ""
    least = min(p.at.begun for p in every)
    last = [p for p in every if p.at.begun == least]
    if any(p.at.endless for p in last) or now - last[0].since < self._stall_seconds:
      return ""
    names = ", ".join(p.name for p in last) if len(last) < len(every) else "every process"
    most = max(every, key=lambda p: p.at.begun).at
    others = f" while others wait in {most.phase!r}" if len(last) < len(every) else ""
    return f"{names} stalled for {self._stall_seconds:g} s in phase {last[0].at.phase!r}{others}"

  def _stop(self, sentence: str) -> None:
    if self._self.at.failure:
      return  # This process has its own error to tell.
    if self.index == 0:
      self._tell({"verdict": sentence})
    end = f"error: {sentence}; {self._self.name} stops; the same command goes on"
    os.write(2, f"{end} from the last checkpoint\n".encode())
    self.leave()
    os._exit(1)


def _may_be_an_echo(kind: type[BaseException]) -> bool:
  """Whether an error may come from a collective that lost another process: not from our modules,
  nor about a file, nor a person's interruption.
  """
  own = kind.__module__.startswith(("gemjax", "pallas_kernels")) or issubclass(kind, OSError)
  return issubclass(kind, Exception) and not own
