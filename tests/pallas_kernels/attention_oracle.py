"""Jagged attention and its gradients in NumPy's float64, segment by segment, pair by pair.

Written from the formulas of api.py and the papers, with none of the code under test.
"""

import math

import numpy as np

ROWS = 1024  # Queries at a time, which bounds memory.


def sigmoid(x):
  return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def function(name, x):
  """(f(x), f'(x)) of a pointwise activation."""
  if name == "silu":
    s = sigmoid(x)
    return x * s, s + x * s * (1 - s)
  if name == "gelu":
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
  if name == "relu2":
    return np.where(x > 0, x, 0) ** 2, 2 * np.where(x > 0, x, 0)
  raise KeyError(name)


def bucket(distance, count, bits, signed):
  """Octave and part of it by logarithms of integers, 2^bits parts to each."""
  side = count // 2 if signed else count
  d = np.abs(distance).astype(np.int64)
  octave = np.zeros_like(d)
  for power in range(1, 32):
    octave += d >= 2**power
  part = ((d - 2**octave) * 2**bits) // 2**octave
  index = np.where(d == 0, 0, np.minimum(1 + octave * 2**bits + part, side - 1))
  return np.where(signed & (distance < 0), index + side, index)


def sees(p, j, causal, window, block):
  """Whether the query at position p (column) sees the key at position j (row)."""
  seen = np.ones(np.broadcast(p, j).shape, bool)
  if causal:
    seen &= j <= p
  if window is not None:
    seen &= np.abs(p - j) < window
  if block is not None:
    seen &= np.floor_divide(p, block) == j // block
  return seen


def attend(
  q, k, v, g, q_offsets, kv_offsets=None, *, activation="softmax", scale=None, norm=None,
  causal=False, window=None, block=None, kv_segment=None, biases=(),
):  # fmt: skip
  """(out, dq, dk, dv, [dtable]) of sum(out * g); biases are (table, q_x, kv_x, bits, signed)."""
  kv_offsets = q_offsets if kv_offsets is None else kv_offsets
  width = q.shape[2]
  scale = scale or (1 / math.sqrt(width) if activation == "softmax" else 1.0)
  out, dq = np.zeros(q.shape), np.zeros(q.shape)
  dk, dv = np.zeros(k.shape), np.zeros(k.shape)
  dtables = [np.zeros(table.shape) for table, *_ in biases]
  for s in range(len(q_offsets) - 1):
    owner = s if kv_segment is None else kv_segment[s]
    keys = slice(kv_offsets[owner], kv_offsets[owner + 1])
    count, queried = keys.stop - keys.start, q_offsets[s + 1] - q_offsets[s]
    if not count:
      continue
    K, V = (x[keys].astype(np.float64) for x in (k, v))
    for first in range(0, queried, ROWS):
      rows = slice(q_offsets[s] + first, q_offsets[s] + min(first + ROWS, queried))
      p = np.arange(first, min(first + ROWS, queried))[:, None] + count - queried
      seen = sees(p, np.arange(count)[None, :], causal, window, block)
      Q, G = (x[rows].astype(np.float64) for x in (q, g))
      for h in range(q.shape[1]):
        score = scale * Q[:, h] @ K[:, h].T
        found = []
        for table, q_x, kv_x, bits, signed in biases:
          distance = q_x[rows].astype(np.int64)[:, None] - kv_x[keys].astype(np.int64)[None, :]
          found.append(bucket(distance, table.shape[1], bits, signed))
          score += table[h].astype(np.float64)[found[-1]]
        pull = G[:, h] @ V[:, h].T
        if activation == "softmax":
          high = np.max(np.where(seen, score, -np.inf), axis=1, keepdims=True, initial=-1e300)
          weight = np.where(seen, np.exp(np.where(seen, score - high, 0)), 0)
          total = weight.sum(1, keepdims=True)
          weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
          slope = weight * (pull - (weight * pull).sum(1, keepdims=True))
        else:
          gain = 1 / (count if norm == "length" else norm or 1)
          f, df = function(activation, score)
          weight, slope = np.where(seen, f * gain, 0), np.where(seen, df * gain * pull, 0)
        out[rows, h] = weight @ V[:, h]
        dq[rows, h] += scale * slope @ K[:, h]
        dk[keys, h] += scale * slope.T @ Q[:, h]
        dv[keys, h] += weight.T @ G[:, h]
        for dtable, index in zip(dtables, found):
          np.add.at(dtable[h], index, slope)
  return out, dq, dk, dv, dtables
