"""What a person sees while a run goes on: a progress bar, a line an evaluation, TensorBoard."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tqdm

from gemjax.parallel.peers import Peers

if TYPE_CHECKING:  # Imported with the first figures: it loads PyTorch where it may.
  from tensorboardX.event_file_writer import EventsWriter


def say(text: str) -> None:
  """A line that does not break a bar."""
  tqdm.tqdm.write(text)
  sys.stdout.flush()  # A file or a pipe should see it now, too.


class Phases:
  """Seconds by name of phase of the start-up; the `peers` are told which phase it is."""

  def __init__(self, peers: Peers | None = None):
    self.peers = peers or Peers()
    self.seconds: dict[str, float] = {}
    self._start = time.perf_counter()

  @property
  def since_start(self) -> float:
    """Seconds, imports included; phases may have run beside each other."""
    return time.perf_counter() - self._start + self.seconds.get("imports", 0.0)

  @contextlib.contextmanager
  def __call__(self, name: str, *, endless: bool = False) -> Iterator[None]:
    self.peers.phase(name, endless=endless)
    start = time.perf_counter()
    yield
    self.add(name, time.perf_counter() - start)

  def add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds

  def at_first_step(self) -> str:
    """Ends the start-up, and says in words how long it took."""
    parts = ", ".join(f"{name} {s:.2f} s" for name, s in self.seconds.items())
    self.add("first step", self.since_start)
    return f"first step after {self.seconds['first step']:.2f} s: {parts}"


class Progress:
  """The bar goes to a terminal only; lines and TensorBoard always."""

  def __init__(self, workdir: pathlib.Path, steps: int, batch_size: int, *, shown: bool = True):
    self._folder = workdir / "tensorboard"
    self._steps, self._batch_size = steps, batch_size
    self._events: EventsWriter | None = None
    self._begun = 0
    self._bar: tqdm.tqdm | None = None
    self._shown = shown  # One process of a run speaks for all.

  def begin(self, step: int) -> None:
    """Opens the bar; what a killed run logged after `step` will be hidden."""
    if not self._shown:
      return
    # Counted in examples, so that the bar's own rate and time left are what people compare.
    self._bar = tqdm.tqdm(
      total=self._steps * self._batch_size,
      initial=step * self._batch_size,
      unit="examples",
      unit_scale=True,
      disable=None,
      leave=False,
    )
    self._begun = step

  def log(self, step: int, scalars: dict[str, float]) -> None:
    """Shows training scalars of the last steps."""
    if not self._shown:
      return
    self._write(step, {f"train/{name}": value for name, value in scalars.items()})
    self._bar.n = step * self._batch_size
    self._bar.set_postfix_str(", ".join(f"{n} {v:.4g}" for n, v in scalars.items()))

  def evaluated(
    self, step: int, split: str, results: dict[str, dict[str, Any]], examples_per_second: float
  ) -> None:
    """Prints one line a task."""
    if not self._shown:
      return
    left = (self._steps - step) * self._batch_size / examples_per_second
    pace = f"{examples_per_second:,.0f} examples/s  {left:,.0f} s left"
    for task, metrics in results.items():
      known = {n: v for n, v in metrics.items() if v is not None}
      self._write(step, {f"{split}/{task}/{name}": value for name, value in known.items()})
      shown = [n for n in ("auc", "gauc", "ne", "log_loss", "calibration") if n in known]
      text = "  ".join(f"{n} {known[n]:.5f}" for n in shown)
      self.say(f"step {step:>7,}/{self._steps:,}  {split} {task:<10}  {text}  {pace}")

  def say(self, text: str) -> None:
    """A line, if this process speaks."""
    if self._shown:
      say(text)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    if self._events is not None:
      with contextlib.suppress(OSError):  # Every call has flushed, or has said why it could not.
        self._events.close()
      self._events = None

  def _write(self, step: int, scalars: dict[str, float]) -> None:
    """In this thread: tensorboardX's own thread would die of a full disk and block the training."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    with self._writing():
      self._open()
      for name, value in scalars.items():
        summary = scalar(name, value)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
      self._events.flush()

  def _open(self) -> None:
    """A file of this start, even if there are two in a second."""
    if self._events is not None:
      return
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    self._folder.mkdir(exist_ok=True)
    self._events = EventsWriter(str(self._folder / "events"), f".{os.getpid()}")
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._events.write_event(event_pb2.Event(step=self._begun + 1, session_log=session))

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise OSError(
        f"writing to {self._folder} failed ({error.strerror}); free the disk, then the same "
        "command goes on from the last checkpoint"
      ) from error
