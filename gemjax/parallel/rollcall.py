"""The roll call before a run: the first process waits for all others, and says who is missing.

JAX's own start ends in an abort of the whole process, which names nobody, where one is missing. So
all meet here before, at the address of the first; JAX's coordinator gets a port of its own, which
the first tells them. The connections stay: gemjax/parallel/peers.py watches over them.

  other -> first   {"index", "count", "host"}
  first -> other   {"port": of JAX's coordinator}, or {"refused": a sentence}
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from typing import Any

from gemjax.parallel.connection import Connection
from gemjax.parallel.place import ADDRESS, COUNT, INDEX, Place, ProcessError, split_address

REPORT_SECONDS = 15.0  # Between two lines that say for whom the first waits.
RETRY_SECONDS = 0.5
NAMED = 8  # Missing processes named in one line.


class Roll:
  """The roll of the first process: who has come, and from which host."""

  def __init__(self, place: Place):
    self.place = place
    self.came: dict[int, Connection] = {}
    self.hosts: dict[int, str] = {0: socket.gethostname()}

  def call(self, seconds: float) -> None:
    """Returns when all have come.

    Raises:
      ProcessError: after `seconds`, with the names of those that are missing; or the port is taken.
    """
    deadline = time.monotonic() + seconds
    report = time.monotonic() + min(REPORT_SECONDS, seconds / 2)
    with self._listen() as server, selectors.DefaultSelector() as selector:
      selector.register(server, selectors.EVENT_READ)
      while len(self.came) < self.place.count - 1:
        for key, _ in selector.select(0.2):
          if key.fileobj is server:
            connection = Connection(server.accept()[0])
            selector.register(connection.socket, selectors.EVENT_READ, connection)
          else:
            self._read(key.data, selector)
        if (now := time.monotonic()) > deadline:
          sentence = f"after {seconds:g} s {self._missing()}; are they started, with this address?"
          self.tell(refused=sentence)
          raise ProcessError(sentence)
        if now > report:
          print(f"waiting: {self._missing()}", file=sys.stderr, flush=True)
          report = now + REPORT_SECONDS

  def tell(self, **line: Any) -> None:
    """Sends a line to all that have come."""
    for connection in self.came.values():
      connection.send(**line)

  def _listen(self) -> socket.socket:
    _, port = split_address(self.place.address)
    both = socket.has_dualstack_ipv6()
    try:
      return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        backlog=self.place.count,
      )
    except OSError as error:
      raise ProcessError(
        f"the first process cannot listen on port {port} of {self.hosts[0]} ({error.strerror}); "
        f"choose another port for {self.place.address}"
      ) from error

  def _read(self, connection: Connection, selector: selectors.BaseSelector) -> None:
    for line in connection.receive():
      if refusal := self._refusal(line):
        connection.send(refused=refusal)
        connection.closed = True
      else:
        self.came[line["index"]] = connection
        self.hosts[line["index"]] = line["host"]
    if connection.closed:  # Started anew it is welcome.
      selector.unregister(connection.socket)
      connection.close()
      self.came = {i: c for i, c in self.came.items() if c is not connection}

  def _refusal(self, line: dict[str, Any]) -> str:
    index, count, host = (line.get(name) for name in ("index", "count", "host"))
    if not (isinstance(index, int) and isinstance(host, str)):
      return "that was no process of this project"
    if count != self.place.count or not 0 < index < count:
      return (
        f"rank {index} of {count} on {host} came to the first process of a run of "
        f"{self.place.count}; give all the same {COUNT} and each its own {INDEX}"
      )
    if index in self.came:
      return (
        f"rank {index} came from {self.hosts[index]} and again from {host}; give every process its "
        f"own {INDEX}"
      )
    return ""

  def _missing(self) -> str:
    missing = [i for i in range(1, self.place.count) if i not in self.came]
    names = ", ".join(self.place.name(i) for i in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return f"{len(missing)} of {self.place.count} processes are missing: {names}{more}"


def answer_roll(place: Place, seconds: float) -> tuple[Connection, int]:
  """For all but the first: (the connection to the first, the port of JAX's coordinator).

  Raises:
    ProcessError: the first was not reached within `seconds`, or refused this process.
  """
  deadline = time.monotonic() + seconds
  reason = ""
  while True:
    try:
      stream = socket.create_connection(split_address(place.address), timeout=5)
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      connection = Connection(stream)
      connection.send(index=place.index, count=place.count, host=socket.gethostname())
      # The first waits as long as this one, but may have begun later.
      if (port := _await_port(connection, seconds + 10)) is not None:
        return connection, port
      reason = "it hung up, or is another program"
    if time.monotonic() > deadline:
      raise ProcessError(
        f"{place.name(place.index, socket.gethostname())} cannot reach the first process at "
        f"{place.address} within {seconds:g} s ({reason}); is it started there, is the port open "
        f"to this host, and is {ADDRESS} right?"
      )
    time.sleep(RETRY_SECONDS)


def _await_port(connection: Connection, seconds: float) -> int | None:
  """The port that the first tells when all are there; None where it hangs up before."""
  deadline = time.monotonic() + seconds
  with selectors.DefaultSelector() as selector:
    selector.register(connection.socket, selectors.EVENT_READ)
    while not connection.closed and time.monotonic() < deadline:
      if not selector.select(1.0):
        continue
      for line in connection.receive():
        if "refused" in line:
          connection.close()
          raise ProcessError(f"the first process says: {line['refused']}")
        if isinstance(line.get("port"), int):
          return line["port"]
  connection.close()
  return None
