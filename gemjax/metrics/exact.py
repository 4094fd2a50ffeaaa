"""Exact metrics of a whole split on the host, in float64.

Letters: N examples, T tasks, U users, R runs of equal (user, score). A metric that is undefined
(no examples, one class only, no user) is nan; `evaluate_arrays` turns nan into None for JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemjax.features import UNLABELLED


def auc(label_N: np.ndarray, score_N: np.ndarray) -> float:
  """Share of (positive, negative) pairs in the right order of score, ties counted half.

  Raises ValueError for a label outside {0, 1} and for a score that is nan.
  """
  auc_U, _ = _auc_by_group(np.zeros(len(label_N), np.int8), label_N, score_N)
  return float(auc_U[0]) if len(auc_U) else float("nan")


def gauc(group_N: np.ndarray, label_N: np.ndarray, score_N: np.ndarray) -> float:
  """Mean over users of the user's AUC, weighted by the user's examples.

  GAUC = Σ_u n_u AUC_u / Σ_u n_u over the users u who have both classes. Group -1 is no user.
  Raises ValueError as `auc` does. Source: Zhou et al., arXiv 1706.06978, section 5.2.
  """
  known_N = np.asarray(group_N) >= 0
  if not known_N.all():
    group_N, label_N, score_N = (np.asarray(x)[known_N] for x in (group_N, label_N, score_N))
  auc_U, examples_U = _auc_by_group(group_N, label_N, score_N)
  both_U = ~np.isnan(auc_U)
  return float(np.average(auc_U[both_U], weights=examples_U[both_U])) if both_U.any() else np.nan


def log_loss(label_N: np.ndarray, logit_N: np.ndarray) -> float:
  """Mean of log(1 + exp(-x)) for label 1 and log(1 + exp(x)) for label 0, in nats."""
  label_N, logit_N = _labels(label_N), np.asarray(logit_N, np.float64)
  return _mean(np.logaddexp(0, np.where(label_N, -logit_N, logit_N)))


def ne(label_N: np.ndarray, logit_N: np.ndarray) -> float:
  """Normalised entropy: log loss / log loss of always predicting the base rate."""
  return _ratio(log_loss(label_N, logit_N), _base_rate_entropy(label_N))


def calibration(label_N: np.ndarray, logit_N: np.ndarray) -> float:
  """Sum of predictions / sum of labels: above 1 predicts too much."""
  # sigmoid(x) = exp(-log(1 + exp(-x))), which neither overflows nor rounds small ones to 0.
  prediction_N = np.exp(-np.logaddexp(0, -np.asarray(logit_N, np.float64)))
  return _ratio(prediction_N.sum(), float(_labels(label_N).sum()))


def evaluate_arrays(
  logits_NT: np.ndarray,
  label_NT: np.ndarray,
  group_N: np.ndarray,
  tasks: Sequence[str],
  oracle_NT: np.ndarray | None = None,
) -> dict[str, dict[str, float | int | None]]:
  """Every metric of every task over the examples that have its label, ready for JSON: what is
  undefined is None.

  With `oracle_NT`, the true probabilities (width 0 counts as none), also `bayes_ne`: the NE of
  the oracle on the same labels, which no model beats but by chance. Raises ValueError for a label
  outside {0, 1}, a logit that is nan, and an oracle outside [0, 1], naming the task.
  """
  out = {}
  for t, task in enumerate(tasks):
    known_N = label_NT[:, t] != UNLABELLED
    label_N, logit_N, user_N = (x[known_N] for x in (label_NT[:, t], logits_NT[:, t], group_N))
    try:
      metrics = {
        "auc": auc(label_N, logit_N),
        "gauc": gauc(user_N, label_N, logit_N),
        "log_loss": log_loss(label_N, logit_N),
        "ne": ne(label_N, logit_N),
        "calibration": calibration(label_N, logit_N),
        "base_rate": _mean(_labels(label_N)),
      }
      if oracle_NT is not None and oracle_NT.shape[1]:
        metrics["bayes_ne"] = _ne_of_probabilities(label_N, oracle_NT[known_N, t])
    except ValueError as error:
      raise ValueError(f"task {task!r}: {error}") from error
    out[task] = {k: float(v) if np.isfinite(v) else None for k, v in metrics.items()}
    out[task]["examples"] = len(label_N)
  return out


def _auc_by_group(group_N, label_N, score_N) -> tuple[np.ndarray, np.ndarray]:
  """AUC (nan for one class only) and examples of every group that occurs."""
  group_N, label_N, score_N = np.asarray(group_N), _labels(label_N), np.asarray(score_N)
  if np.isnan(score_N).any():
    raise ValueError(f"{np.isnan(score_N).sum()} of {len(score_N)} scores are nan")
  if not len(label_N):
    return np.zeros(0), np.zeros(0, np.int64)
  order_N = np.lexsort((score_N, group_N))
  group_N, label_N, score_N = group_N[order_N], label_N[order_N], score_N[order_N]

  new_user_N = np.r_[True, group_N[1:] != group_N[:-1]]
  start_R = np.flatnonzero(new_user_N | np.r_[True, score_N[1:] != score_N[:-1]])
  examples_R = np.diff(np.r_[start_R, len(label_N)])
  positive_R = np.add.reduceat(label_N, start_R, dtype=np.int64)
  negative_R = examples_R - positive_R

  start_U = np.flatnonzero(new_user_N[start_R])  # The first run of every user.
  examples_U, positive_U, negative_U = (
    np.add.reduceat(x_R, start_U) for x_R in (examples_R, positive_R, negative_R)
  )
  below_R = np.cumsum(negative_R) - negative_R  # Over all users ...
  below_R -= np.repeat(below_R[start_U], np.diff(np.r_[start_U, len(start_R)]))  # ... and one.
  # Twice the pairs in order, so that halves stay integers: exact below 2^62 pairs.
  right_U = np.add.reduceat(positive_R * (2 * below_R + negative_R), start_U)
  pairs_U = 2.0 * positive_U * negative_U
  return np.where(pairs_U > 0, right_U / np.maximum(pairs_U, 1), np.nan), examples_U


def _ne_of_probabilities(label_N, probability_N) -> float:
  probability_N = np.asarray(probability_N, np.float64)
  if not ((probability_N >= 0) & (probability_N <= 1)).all():
    raise ValueError(f"oracle outside [0, 1]: {probability_N.min()} to {probability_N.max()}")
  with np.errstate(divide="ignore"):  # An impossible event that happened costs infinity.
    loss = _mean(-np.log(np.where(_labels(label_N), probability_N, 1 - probability_N)))
  return _ratio(loss, _base_rate_entropy(label_N))


def _base_rate_entropy(label_N) -> float:
  p = _mean(_labels(label_N))
  return -p * np.log(p) - (1 - p) * np.log1p(-p) if 0 < p < 1 else 0.0


def _labels(label_N) -> np.ndarray:
  label_N = np.asarray(label_N)
  positive_N = label_N == 1
  strange_N = ~(positive_N | (label_N == 0))
  if strange_N.any():
    raise ValueError(f"labels must be 0 or 1, got {label_N[strange_N][0]}")
  return positive_N


def _mean(x_N: np.ndarray) -> float:
  return float(x_N.mean()) if len(x_N) else float("nan")


def _ratio(a: float, b: float) -> float:
  return a / b if b else float("nan")
