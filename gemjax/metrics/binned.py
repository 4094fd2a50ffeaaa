"""Metrics as sums that stay on the device and merge across batches, devices, hosts and windows.

Letters: B examples, T tasks, L = 2 labels (negative, positive), K bins, P = 2 parts of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemjax.features import UNLABELLED

BINS = 4096
# Half of the bins cover logits in [-8, 8]: click rates down to 1 in 3,000 fall into the fine half.
_LOGIT_SCALE = 8.0


class MetricSums(NamedTuple):
  """Sums over examples, each kept as two float32 parts whose float64 sum is the value.

  One float32 stops counting at 2^24 and drifts long before; the second part holds what rounding
  took from the first. Counts are then exact up to 2^48 examples and need no 64-bit integers,
  which JAX has switched off.
  """

  count_PTLK: jax.Array  # Examples by label and by bin of the prediction.
  loss_PT: jax.Array  # Sum of log losses, nats.
  prediction_PT: jax.Array  # Sum of predicted probabilities.


def zeros(tasks: int, *, bins: int = BINS) -> MetricSums:
  """The sums over no examples."""
  shapes = MetricSums((2, tasks, 2, bins), (2, tasks), (2, tasks))
  return MetricSums(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def merge(a: MetricSums, b: MetricSums) -> MetricSums:
  """The sums over the examples of both; associative and commutative up to 2^-47."""
  return jax.tree.map(_add, a, b)


def of_batch(
  logits_BT: jax.Array, label_BT: jax.Array, weight_B: jax.Array, *, bins: int = BINS
) -> MetricSums:
  """The sums over one batch of up to 2^24 examples; those of the parts of a batch may be added.

  loss = softplus(-x) for label 1, softplus(x) for label 0; prediction = sigmoid(x). The bin of
  logit x is that of x / (8 + |x|), which maps every logit into (-1, 1) in order, so that none is
  clipped. Labels are 0 or 1; a task leaves out examples that are UNLABELLED, all tasks rows of
  `weight_B` 0, which are padding, and all others count once.
  A logit that is not a number makes the loss, and with it NE and calibration, nan.
  """
  tasks = logits_BT.shape[1]
  x_BT, positive_BT = logits_BT.astype(jnp.float32), label_BT > 0.5
  real_BT = (weight_B[:, None] > 0) & (label_BT != UNLABELLED)
  loss_BT = jax.nn.softplus(jnp.where(positive_BT, -x_BT, x_BT))
  prediction_BT = jax.nn.sigmoid(x_BT)

  bin_BT = _bin(x_BT, bins)
  index_BT = (2 * jnp.arange(tasks) + positive_BT) * bins + bin_BT
  # Integer addition: float scatter-adds on GPUs slow down where many rows meet in one bin.
  count_X = jnp.zeros(tasks * 2 * bins, jnp.int32)
  count_X = count_X.at[index_BT].add(real_BT.astype(jnp.int32), mode="promise_in_bounds")

  batch = MetricSums(
    count_X.reshape(tasks, 2, bins).astype(jnp.float32),
    # Selected and not multiplied: padding may hold infinities.
    jnp.sum(jnp.where(real_BT, loss_BT, 0), axis=0),
    jnp.sum(jnp.where(real_BT, prediction_BT, 0), axis=0),
  )
  return jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), batch)


def result(sums: MetricSums, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
  """Reads the sums on the host: per task `loss, ne, calibration, auc_binned, auc_error, ...`.

  loss        mean log loss, nats
  base_rate   p = positives / examples
  ne          loss / (-p log p - (1 - p) log(1 - p))
  calibration sum of predictions / positives
  auc_binned  Σ_k pos_k (neg_<k + neg_k / 2) / (positives * negatives): a pair in one bin is a tie
  auc_error   Σ_k pos_k neg_k / (2 positives * negatives): |auc_binned - exact AUC| is at most this

  What is undefined is nan, without a warning: all but `examples` for no examples; NE, AUC and its
  error for one class only; calibration for no positives. Raises ValueError unless there is one
  name a task.
  """
  if len(tasks) != sums.loss_PT.shape[1]:
    raise ValueError(f"{len(tasks)} task names {list(tasks)} for sums of {sums.loss_PT.shape[1]}")
  count_TLK, loss_T, prediction_T = (np.asarray(x, np.float64).sum(0) for x in sums)
  return {task: _result(count_TLK[t], loss_T[t], prediction_T[t]) for t, task in enumerate(tasks)}


def _result(count_LK: np.ndarray, loss: float, prediction: float) -> dict[str, float]:
  negative_K, positive_K = count_LK
  negatives, positives = count_LK.sum(1)
  examples = negatives + positives
  with np.errstate(divide="ignore", invalid="ignore"):
    p = positives / examples
    entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)  # nan for one class: 0 log 0
    below_K = np.cumsum(negative_K) - negative_K
    pairs = positives * negatives
    out = {
      "loss": loss / examples,
      "ne": loss / examples / entropy,
      "calibration": prediction / positives if positives else np.nan,
      "auc_binned": positive_K @ (below_K + negative_K / 2) / pairs,
      "auc_error": positive_K @ negative_K / 2 / pairs,
      "base_rate": p,
    }
  return {k: float(v) for k, v in out.items()} | {"examples": int(examples)}


def _bin(x: jax.Array, bins: int) -> jax.Array:
  squashed = jnp.where(jnp.isinf(x), jnp.sign(x), x / (_LOGIT_SCALE + jnp.abs(x)))
  bin_ = jnp.floor((squashed + 1) * (bins / 2))
  # The clip also gives nan a place inside; it shows as a nan loss.
  return jnp.clip(jnp.nan_to_num(bin_), 0, bins - 1).astype(jnp.int32)


def _add(a_P: jax.Array, b_P: jax.Array) -> jax.Array:
  """a + b in two parts: Knuth's exact TwoSum of the high parts, the low parts joined below."""
  (a, a_low), (b, b_low) = a_P, b_P
  high = a + b
  b_seen = high - a
  low = (a - (high - b_seen)) + (b - b_seen) + (a_low + b_low)
  total = high + low
  return jnp.stack([total, low - (total - high)])
