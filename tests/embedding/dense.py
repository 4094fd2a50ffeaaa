"""Embedding tables as a textbook has them: whole, in float64, every row touched by every step.

Knows nothing of positions, owners, duplicates or clocks. Letters: R rows, W columns of a table.
"""

import numpy as np

EPS = 1e-8


class DenseTable:
  """One table under one optimiser; `accumulated` divides the sum of squares (average mode)."""

  def __init__(self, rows_RW, optimizer, decay=0.0, l2=0.0, eps=EPS, accumulated=1):
    self.optimizer, self.decay, self.l2, self.eps = optimizer, decay, l2, eps
    self.accumulated = accumulated
    self.w = np.array(rows_RW, np.float64)
    per_row = optimizer == "rowwise_adagrad"
    self.v = np.zeros(len(self.w)) if per_row else np.zeros_like(self.w)
    self.m, self.n = np.zeros_like(self.w), np.zeros(len(self.w))

  def step(self, grad_RW, touched_R, lr):
    """All rows shrink; those that the batch touched move."""
    self.w *= 1 - lr * self.decay
    self.w *= np.exp(-lr * self.l2 * self.scale())
    g, t = np.asarray(grad_RW, np.float64), np.asarray(touched_R)
    if self.optimizer == "lazy_adam":
      self.n[t] += 1
      self.m[t] = 0.9 * self.m[t] + 0.1 * g[t]
      self.v[t] = 0.999 * self.v[t] + 0.001 * g[t] ** 2
      g = self.m / (1 - 0.9 ** np.maximum(1, self.n))[:, None]
    elif self.optimizer == "rowwise_adagrad":
      self.v[t] += np.mean(g[t] ** 2, 1)
    elif self.optimizer == "adagrad":
      self.v[t] += g[t] ** 2
    self.w[t] -= (lr * g * self.scale())[t]

  def slots(self):
    """What the optimiser keeps, by its name there."""
    names = {"sgd": "", "lazy_adam": "mvn"}.get(self.optimizer, "v")
    return {name: getattr(self, name) for name in names}

  def scale(self):
    v = self.v if self.v.ndim == 2 else self.v[:, None]
    if self.optimizer == "sgd":
      return np.ones_like(self.w)
    if self.optimizer == "lazy_adam":
      v = v / (1 - 0.999 ** np.maximum(1, self.n))[:, None]
    else:
      v = v / self.accumulated
    return 1 / (np.sqrt(v) + self.eps)


def summed(size, rows, grads):
  """(grad_RW, touched_R) of a table of `size` rows from (row, gradient) pairs."""
  rows, grads = np.asarray(rows, np.int64), np.asarray(grads, np.float64)
  grad_RW = np.zeros((size, grads.shape[-1]))
  np.add.at(grad_RW, rows, grads)
  return grad_RW, np.isin(np.arange(size), rows)


def bfloat16_errors(stored, exact):
  """(stored - exact) in units of the spacing of bfloat16 there: between -1 and 1 if rounded to a
  neighbour, 0 in the mean if without bias.
  """
  exact = np.asarray(exact, np.float64)
  spacing = 2.0 ** (np.floor(np.log2(np.abs(exact) + 1e-30)) - 7)
  return ((np.asarray(stored, np.float64) - exact) / spacing).ravel()


def assert_rounded_without_bias(errors):
  """Of many `bfloat16_errors`. The step itself is computed in float32: 0.001 more."""
  assert len(errors) > 5_000
  assert np.abs(errors).max() < 1.001
  # The variance of a rounding is at most 1/4.
  assert abs(errors.mean()) < 5 * 0.5 / np.sqrt(len(errors))
