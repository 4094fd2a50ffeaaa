"""Exact evaluation of a state on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gemjax import metrics
from gemjax.features import Batch, FeatureSet
from gemjax.parallel.arrays import of_all_processes


class PredictionError(ValueError):
  """Predictions that are not finite."""


def evaluate(
  predict: Callable[[Any, Batch], np.ndarray],
  state: Any,
  batches: Iterable[Batch],
  features: FeatureSet,
) -> dict[str, dict[str, float | None]]:
  """Task -> auc, gauc, log_loss, ne, calibration, ..., over every example once.

  Args:
    predict: (state, batch) -> logits_BT, rows of this process as in the batch.
    state: What `predict` reads.
    batches: Of this process; rows of weight 0 are left out.
    features: Names the tasks.

  Raises:
    PredictionError: a logit is not finite.
  """
  parts = [
    (predict(state, batch), batch.label_BT, batch.group_B, batch.oracle_BT, batch.weight_B)
    for batch in batches
  ]
  # Padding included, so that all processes have equally many rows.
  logits_NT, label_NT, group_N, oracle_NT, weight_N = (
    of_all_processes(np.concatenate(part)) for part in zip(*parts)
  )
  real_N = weight_N > 0
  logits_NT, label_NT, group_N, oracle_NT = (
    x[real_N] for x in (logits_NT, label_NT, group_N, oracle_NT)
  )
  if bad := int((~np.isfinite(logits_NT)).any(1).sum()):
    raise PredictionError(f"{bad:,} of {len(logits_NT):,} predictions are not finite")
  return metrics.evaluate_arrays(
    logits_NT,
    label_NT,
    group_N,
    list(features.tasks),
    oracle_NT=oracle_NT if oracle_NT.shape[1] else None,
  )
