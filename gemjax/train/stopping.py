"""Early stopping on a metric of the validation split."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

HIGHER_IS_BETTER = {"auc": True, "gauc": True, "ne": False, "log_loss": False}


@dataclasses.dataclass(slots=True)
class BestSoFar:
  """The best evaluation so far and how many came since; saved with every checkpoint."""

  metric: str
  step: int | None = None
  value: float | None = None
  since: int = 0  # Evaluations without improvement.

  def update(self, step: int, value: float | None) -> None:
    """An undefined value (one class only) never improves."""
    if value is not None and self._improves(value):
      self.step, self.value, self.since = step, value, 0
    else:
      self.since += 1

  def stopped(self, patience: int) -> bool:
    """Whether `patience` evaluations, if that is not 0, brought nothing better."""
    return 0 < patience <= self.since

  def verdict(self) -> str:
    """What the evaluations since the best have shown."""
    was = "it was never defined"  # One class only.
    if self.value is not None:
      was = f"best {self.value:.5f} at step {self.step:,}"
    return f"{self.metric} did not improve in {self.since} evaluations; {was}"

  def _improves(self, value: float) -> bool:
    if not math.isfinite(value):
      return False
    if self.value is None:
      return True
    return value > self.value if HIGHER_IS_BETTER[self.metric] else value < self.value

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
