"""Balance: which examples share a batch, and which a device, decided by what they cost.

`alike` deals blocks to windows, whose mean costs differ where the file is in order of time.
`groups` deals the examples of a window to its batches, `halves` those of a batch to its halves,
quarters and so on, so that every power of two of devices gets parts of nearly equal cost and the
stream does not depend on the mesh. Both deal from the costliest example down, and give the
costlier of those dealt together to the group that has least so far: what the heavy ones leave
uneven, the many light ones even out.

Costs are of K kinds: the first is what an example costs in all, by which it is dealt; the others,
as the events of each of several histories, are to be even, too. Among examples of like cost it is
the kind that is most uneven so far, beside its deviation among examples, that decides, if they
differ in it.

Letters: n examples, K kinds of cost, G groups, P parts of a batch, M pairs of a part.
"""

from __future__ import annotations

import itertools

import numpy as np

JITTER = 0.2
MANY = 32  # Parts, from which on numpy is faster than Python's numbers.


def alike(blocks: int, most: int, rng: np.random.Generator) -> list[np.ndarray]:
  """Windows of up to `most` blocks: of each W neighbours in the file, each of W windows has one."""
  count = -(-blocks // most)
  rows = [
    rng.permutation(np.arange(first, min(first + count, blocks)))
    for first in range(0, blocks, count)
  ]
  return [np.array([row[w] for row in rows if w < len(row)]) for w in range(count)]


def groups(cost_Kn: np.ndarray, sizes_G: list[int], rng: np.random.Generator) -> np.ndarray:
  """An order of the examples in which the first sizes[0], the next sizes[1], .. cost alike.

  Every row of the deal has one example for each group, for a group of a fraction of the largest
  size only in that fraction of the rows, and has examples of like cost, up to `JITTER`: so that
  one window gives new groups in every epoch.
  """
  (kinds, n), sizes_G, scale_K = cost_Kn.shape, np.asarray(sizes_G), _scale(cost_Kn)
  about_n = cost_Kn[0] * rng.uniform(1 - JITTER, 1 + JITTER, n)
  falling_n = np.argsort(-about_n, kind="stable")
  group_n = np.empty(n, np.int64)
  # Cost above the mean of the rows in which a group took part.
  excess_KG = np.zeros((kinds, len(sizes_G)))
  rows, first = int(sizes_G.max()), 0
  every, uneven_sizes = np.arange(len(sizes_G)), bool((sizes_G < rows).any())
  for r in range(rows):
    dealt = every
    if uneven_sizes:
      dealt = np.flatnonzero(sizes_G * (r + 1) // rows > sizes_G * r // rows)
    row = falling_n[first : first + len(dealt)]
    k = 0
    if kinds > 1:
      cost_KR = cost_Kn[:, row]
      differs_K = (cost_KR != cost_KR[:, :1]).any(1)  # Elsewhere the row mends nothing.
      k = np.argmax(np.where(differs_K, _deviation(excess_KG[:, dealt]) / scale_K, 0))
    row = row[np.argsort(-cost_Kn[k, row], kind="stable")]
    dealt = rng.permutation(dealt)
    dealt = dealt[np.argsort(excess_KG[k, dealt], kind="stable")]
    group_n[row] = dealt
    cost_KR = cost_Kn[:, row]
    excess_KG[:, dealt] += cost_KR - cost_KR.mean(1, keepdims=True)
    first += len(dealt)
  shuffled_n = rng.permutation(n)  # Within a group in random order.
  return shuffled_n[np.argsort(group_n[shuffled_n], kind="stable")]


def halves(cost_Kn: np.ndarray, shards: int | None = None) -> np.ndarray:
  """An order in which both halves cost alike, and both halves of each, while they are even.

  With `shards` only which shard has an example is as without, not where in the shard it is.
  """
  weight_K = 1 / _scale(cost_Kn)
  parts = np.argsort(-cost_Kn[0], kind="stable")[None]  # (parts, examples), costliest first.
  while parts.shape[1] % 2 == 0 and (shards is None or len(parts) % shards):
    heavy, light = parts[:, ::2], parts[:, 1::2]
    gap_PMK = np.moveaxis(cost_Kn[:, heavy] - cost_Kn[:, light], 0, -1)
    if len(parts) < MANY:
      left = np.array([_left(gaps, weight_K.tolist()) for gaps in gap_PMK.tolist()])
    else:
      left = _left_of_many(gap_PMK, weight_K)
    split = np.stack([np.where(left, heavy, light), np.where(left, light, heavy)], 1)
    parts = split.reshape(-1, split.shape[2])
  # Parts of odd size may be cut further, by other numbers of devices: in no order of cost.
  mixed = np.random.default_rng(parts.shape[1]).permutation(parts.shape[1])
  return parts[:, mixed].reshape(-1)


def _left(gap_MK: list[list[float]], weight_K: list[float]) -> list[bool]:
  """Whether the heavier of each pair goes to the left half: where the left one is not ahead, in
  the kind of cost that is most uneven; and the lighter one, where it has more of that.
  """
  if len(weight_K) == 1:  # The heavier is ahead in it, always.
    follow = lambda ahead, gap_K: ahead + (gap_K[0] if ahead <= 0 else -gap_K[0])
    return [ahead <= 0 for ahead in itertools.accumulate(gap_MK, follow, initial=0.0)][:-1]
  ahead_K, out, kinds = [0.0] * len(weight_K), [], range(len(weight_K))
  for gap_K in gap_MK:
    most = -1.0
    for i in kinds:
      uneven = abs(ahead_K[i] * weight_K[i]) if gap_K[i] else 0.0
      if uneven > most:
        most, k = uneven, i
    left = ahead_K[k] <= 0 if gap_K[k] >= 0 else ahead_K[k] > 0
    out.append(left)
    for i in kinds:
      ahead_K[i] += gap_K[i] if left else -gap_K[i]
  return out


def _left_of_many(gap_PMK: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
  """(P, M) bool: `_left` of P parts, a pair of every one at a time."""
  parts, pairs, kinds = gap_PMK.shape
  left_MP, ahead_PK, every = np.empty((pairs, parts), bool), np.zeros((parts, kinds)), range(parts)
  for left_P, gap_PK in zip(left_MP, np.moveaxis(gap_PMK, 1, 0)):
    uneven_PK = np.where(gap_PK != 0, np.abs(ahead_PK * weight_K), 0)
    k_P = uneven_PK.argmax(1)
    ahead_P = ahead_PK[every, k_P]
    left_P[:] = np.where(gap_PK[every, k_P] >= 0, ahead_P <= 0, ahead_P > 0)
    ahead_PK += np.where(left_P[:, None], gap_PK, -gap_PK)
  return left_MP.T


def _scale(cost_Kn: np.ndarray) -> np.ndarray:
  """The deviation of each kind of cost; infinite where all cost the same."""
  deviation_K = _deviation(cost_Kn)
  return np.where(deviation_K > 0, deviation_K, np.inf)


def _deviation(x_Kn: np.ndarray) -> np.ndarray:
  """x.std(1), in a third of its time where there are few."""
  x_Kn = x_Kn - x_Kn.mean(1, keepdims=True)
  return np.sqrt((x_Kn * x_Kn).sum(1) / x_Kn.shape[1])
