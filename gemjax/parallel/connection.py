"""JSON lines between the first process of a run and each of the others, over TCP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

LONGEST = 1 << 16  # Bytes of a line; what sends more is none of us.
SEND_SECONDS = 5.0


class Connection:
  """Lines of one other process; `closed` once it, or its host's kernel, has hung up."""

  def __init__(self, stream: socket.socket):
    self.socket = stream
    stream.settimeout(SEND_SECONDS)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.closed = False
    self.heard = time.monotonic()
    self._rest = b""
    self._sending = threading.Lock()

  def send(self, **line: Any) -> None:
    """Sends one line; a failure closes the connection, which the reader notices."""
    try:
      with self._sending:  # The watch and the main thread both send.
        self.socket.sendall(json.dumps(line).encode() + b"\n")
    except OSError:
      self.closed = True

  def receive(self) -> list[dict[str, Any]]:
    """The lines that have come, for a caller who knows that there is something to read."""
    try:
      found = self.socket.recv(LONGEST)
    except OSError:
      found = b""
    *lines, self._rest = (self._rest + found).split(b"\n")
    self.heard = time.monotonic()
    try:
      trees = [json.loads(line) for line in lines]
      if len(self._rest) > LONGEST or not all(isinstance(tree, dict) for tree in trees):
        raise ValueError
    except ValueError:
      trees, found = [], b""
    if not found:
      self.closed = True
    return trees

  def hang_up(self) -> None:
    """The other process sees the end of this one's lines; its own may still come."""
    with contextlib.suppress(OSError):  # It is gone already.
      self.socket.shutdown(socket.SHUT_WR)

  def close(self) -> None:
    self.closed = True
    self.socket.close()
