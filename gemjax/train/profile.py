"""A few steps of a run, traced: where their time went. gemjax/plan/measured.py lays it beside what
a plan says of the same program.
"""

from __future__ import annotations

import json
import pathlib
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

BEFORE = 10  # Steps of a start that are left alone: compilation, first batches.
TRACE, REPORT, PROGRAM = "profile", "profile.json", "profile/step.hlo"
_NCCL = "nccl"


class Ran(NamedTuple):
  """What was traced."""

  text: str  # The compiled program.
  device: str  # As in "NVIDIA H100 80GB HBM3".
  mesh: dict[str, int]
  gpus_per_host: int
  kernel_flops: float  # Matrix FLOPs of a device in kernels whose loops follow the data.


class Profile:
  """Traces `steps` steps into FOLDER/profile, for xprof or TensorBoard, with the program that ran
  in FOLDER/profile/step.hlo, and writes what the devices of this process measured to
  FOLDER/profile.json, under the names of `launch/plan.py --json`.
  """

  def __init__(self, folder: pathlib.Path, steps: int):
    self._folder, self._steps, self._count, self._start = folder, steps, 0, 0.0

  def before(self, state: Any) -> None:
    """Call it before every step with what the step waits for."""
    if self._steps and self._count == BEFORE:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder / TRACE))
      self._start = time.perf_counter()

  def after(self, result: Any, ran: Callable[[], Ran]) -> None:
    """Call it behind every step with what it gave, and what tells its program."""
    self._count += 1
    if self._steps and self._count == BEFORE + self._steps:
      jax.block_until_ready(result)
      seconds = time.perf_counter() - self._start
      jax.profiler.stop_trace()
      if not jax.process_index():
        found = {"steps": self._steps, "step_seconds": seconds / self._steps}
        traces = (self._folder / TRACE).rglob(f"{socket.gethostname()}*.xplane.pb")
        trace = max(traces, key=lambda file: file.stat().st_mtime)
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        text, *about = ran()
        found |= dict(zip(Ran._fields[1:], about)) | of_devices(planes, seconds, self._steps)
        (self._folder / PROGRAM).write_text(text)
        (self._folder / REPORT).write_text(json.dumps(found, indent=1) + "\n")


def of_devices(planes: Iterable[Any], seconds: float, steps: int) -> dict[str, Any]:
  """What the GPUs among the planes of a trace did in `seconds`; {} where there is none.

    exposed_communication_share   time in which NCCL's kernels ran and no others / all time
    idle_share                    time in which no kernel ran / all time
    kernel_seconds                kernel -> seconds a step, the costliest ten
    operation_seconds             instruction of the program -> seconds a step; "" is what the trace
                                  names none for, as inside CUDA graphs

  Averages over the GPUs.
  """
  gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
  exposed = idle = 0.0
  kernels, operations = {}, {}
  for gpu in gpus:
    spans = {True: [], False: []}
    for line in gpu.lines:
      if not line.name.startswith("Stream"):
        continue  # Other lines repeat the kernels, by module and by name.
      for event in line.events:
        spans[_NCCL in event.name.lower()].append((event.start_ns, event.end_ns))
        part = event.duration_ns / 1e9 / steps / len(gpus)
        kernels[event.name] = kernels.get(event.name, 0.0) + part
        operation = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
        operations[operation] = operations.get(operation, 0.0) + part
    computing, busy = _covered(spans[False]), _covered(spans[True] + spans[False])
    exposed += (busy - computing) / 1e9 / len(gpus)
    idle += (seconds - busy / 1e9) / len(gpus)
  if not gpus:
    return {}
  costliest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:10])
  return {
    "exposed_communication_share": exposed / seconds,
    "idle_share": max(0.0, idle / seconds),
    "kernel_seconds": costliest,
    "operation_seconds": operations,
  }


def _covered(spans: list[tuple[float, float]]) -> float:
  """Length of the union of intervals."""
  covered, reached = 0.0, float("-inf")
  for start, end in sorted(spans):
    covered += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return covered
