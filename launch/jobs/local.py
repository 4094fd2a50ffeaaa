"""Several processes of one run on this host: their devices, their output, their end."""

from __future__ import annotations

import ctypes
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from gemjax.parallel.place import ADDRESS, COUNT, HOSTS, INDEX, Place, visible_gpus

KILL_SECONDS = 15.0  # From the first failure until those that have not ended are killed.
DRAIN_SECONDS = 5.0  # For output that a grandchild keeps open.


class LocalError(ValueError):
  """Processes that cannot be started as asked."""


def environments(
  processes: int, outer: Place, visible: list[str], environ: Mapping[str, str]
) -> list[dict[str, str]]:
  """The environment of each process: its place, and its part of the `visible` GPUs.

  Args:
    processes: How many here.
    outer: This host's place where a scheduler has started one launcher a host.
    visible: Names of this host's GPUs; none: the processes have the CPU.
    environ: Of this process.

  Raises:
    LocalError: the GPUs cannot be divided.
  """
  if outer.devices is not None:
    visible = [visible[i] for i in outer.devices]
  if len(visible) % processes:
    raise LocalError(
      f"{len(visible)} GPUs cannot be divided among --processes={processes}; choose a divisor"
    )
  each = len(visible) // processes
  common = {**environ, "PYTHONUNBUFFERED": "1", ADDRESS: outer.address or f"127.0.0.1:{_port()}"}
  common[COUNT] = str(outer.count * processes)
  if outer.hosts:
    common[HOSTS] = ",".join(outer.hosts)
  found = []
  for i in range(processes):
    own = {INDEX: str(outer.index * processes + i)}
    if each:
      own["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i * each : (i + 1) * each])
    found.append(common | own)
  return found


def gpus(environ: Mapping[str, str]) -> list[str]:
  """The GPUs that a process started here would see."""
  if environ.get("JAX_PLATFORMS") == "cpu":
    return []
  if (named := visible_gpus(environ)) is not None:
    return named
  count = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
  return [str(i) for i in range(count)]


def run(command: list[str], environs: list[dict[str, str]]) -> int:
  """Runs `command` once an environment until all have ended; the exit code of the first failure.

  Lines of output begin with `[rank] `. The first failure ends all others, SIGTERM and SIGINT are
  handed on. Should this process be killed, the kernel ends the others.

  Raises:
    LocalError: there is no such command.
  """
  ended: queue.Queue[tuple[int, int]] = queue.Queue()
  children: list[_Child] = []
  asked: list[int] = []  # Signals that came to this process.

  def hand_on(number: int, frame) -> None:
    del frame
    asked.append(number)
    for child in children:
      child.send(number)

  before = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
  killer = threading.Timer(KILL_SECONDS, lambda: [c.send(signal.SIGKILL) for c in children])
  killer.daemon = True
  code = 0
  try:
    for environ in environs:
      children.append(_Child(command, environ, len(children), ended))
    for _ in children:
      index, status = ended.get()
      if status and not code:
        code = status if status > 0 else 128 - status
        if not asked:
          rank = environs[index][INDEX]
          _say(f"error: rank {rank} {_how(status)} before all others, which are stopped")
          killer.start()
          for child in children:
            child.send(signal.SIGTERM)
  finally:
    for child in children:
      child.send(signal.SIGKILL)  # Only those are left that an error here has left.
    killer.cancel()
    for number, handler in before.items():
      signal.signal(number, handler)
  return code


class _Child:
  """One process, whose output is labelled by threads, and whose end goes to a queue."""

  def __init__(self, command: list[str], environ: dict[str, str], number: int, ended: queue.Queue):
    try:
      self._process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # A Ctrl-C of the terminal comes once, from here.
        preexec_fn=_end_with_parent,
      )
    except OSError as error:
      raise LocalError(f"{command[0]} cannot be started ({error.strerror})") from error
    label = f"[{environ[INDEX]}] ".encode()
    streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
    self._readers = [
      threading.Thread(target=_label, args=(label, *pair), daemon=True) for pair in streams
    ]
    for reader in self._readers:
      reader.start()
    threading.Thread(target=self._await, args=(number, ended), daemon=True).start()

  def send(self, number: int) -> None:
    if self._process.poll() is None:
      try:
        os.killpg(self._process.pid, number)
      except ProcessLookupError:
        return

  def _await(self, number: int, ended: queue.Queue) -> None:
    status = self._process.wait()
    for reader in self._readers:
      reader.join(DRAIN_SECONDS)
    ended.put((number, status))


_WRITING = threading.Lock()  # Lines of several processes stay whole.


def _label(label: bytes, stream, out) -> None:
  for line in stream:
    with _WRITING:
      out.buffer.write(label + line.rstrip(b"\n") + b"\n")
      out.buffer.flush()


def _say(line: str) -> None:
  with _WRITING:
    print(line, file=sys.stderr, flush=True)


def _how(status: int) -> str:
  if status > 0:
    return f"ended with exit code {status}"
  return f"was killed by {signal.Signals(-status).name}"


def _end_with_parent() -> None:
  set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h.
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]
