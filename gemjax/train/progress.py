"""What a person sees while a run goes on: a progress bar, a line an evaluation, TensorBoard."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import tensorboardX
import tqdm


class Phases:
  """Seconds by name of phase."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.add(name, time.perf_counter() - start)

  def add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Progress:
  """The bar goes to a terminal only; lines and TensorBoard always."""

  def __init__(self, workdir: pathlib.Path, steps: int, batch_size: int):
    self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))
    self._steps, self._batch_size = steps, batch_size
    self._bar: tqdm.tqdm | None = None
    self._start = 0.0

  def begin(self, step: int) -> None:
    """Time is counted from here."""
    self._start, self._first = time.perf_counter(), step
    self._bar = tqdm.tqdm(total=self._steps, initial=step, unit="step", disable=None, leave=False)

  def log(self, step: int, scalars: dict[str, float]) -> None:
    """Shows training scalars of the last steps."""
    for name, value in scalars.items():
      self._writer.add_scalar(f"train/{name}", value, step)
    self._bar.n = step
    self._bar.set_postfix_str(", ".join(f"{n} {v:.4g}" for n, v in scalars.items()))

  def evaluated(self, step: int, split: str, results: dict[str, dict[str, Any]]) -> None:
    """Prints one line a task."""
    for task, metrics in results.items():
      for name, value in metrics.items():
        if value is not None:
          self._writer.add_scalar(f"{split}/{task}/{name}", value, step)
      shown = {n: metrics.get(n) for n in ("auc", "gauc", "ne", "log_loss", "calibration")}
      text = "  ".join(f"{n} {v:.5f}" for n, v in shown.items() if v is not None)
      self.say(f"step {step:>7,}/{self._steps:,}  {split} {task:<10}  {text}{self._left(step)}")

  def say(self, text: str) -> None:
    """A line that does not break the bar."""
    tqdm.tqdm.write(text)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    self._writer.close()

  def _left(self, step: int) -> str:
    if self._bar is None or step <= self._first:
      return ""
    rate = (step - self._first) / (time.perf_counter() - self._start)
    left = (self._steps - step) / rate
    return f"  {rate * self._batch_size:,.0f} examples/s  {left:,.0f} s left"
