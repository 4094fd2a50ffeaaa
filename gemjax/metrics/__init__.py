"""Metrics of the field: sums on the device while training, exact figures on the host at the end."""

from gemjax.metrics.binned import MetricSums, merge, of_batch, result, zeros
from gemjax.metrics.exact import auc, calibration, evaluate_arrays, gauc, log_loss, ne

__all__ = [
  "MetricSums",
  "auc",
  "calibration",
  "evaluate_arrays",
  "gauc",
  "log_loss",
  "merge",
  "ne",
  "of_batch",
  "result",
  "zeros",
]
