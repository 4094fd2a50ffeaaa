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

Letters: n examples, K kinds of cost, G groups.
"""

from __future__ import annotations

import numpy as np

JITTER = 0.2


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
  for r in range(rows):
    dealt = np.flatnonzero(sizes_G * (r + 1) // rows > sizes_G * r // rows)
    row = falling_n[first : first + len(dealt)]
    uneven_K = excess_KG[:, dealt].std(1) / scale_K
    k = np.argmax(np.where(cost_Kn[:, row].std(1) > 0, uneven_K, 0))  # Else the row mends nothing.
    row = row[np.argsort(-cost_Kn[k, row], kind="stable")]
    dealt = rng.permutation(dealt)
    dealt = dealt[np.argsort(excess_KG[k, dealt], kind="stable")]
    group_n[row] = dealt
    excess_KG[:, dealt] += cost_Kn[:, row] - cost_Kn[:, row].mean(1, keepdims=True)
    first += len(dealt)
  shuffled_n = rng.permutation(n)  # Within a group in random order.
  return shuffled_n[np.argsort(group_n[shuffled_n], kind="stable")]


def halves(cost_Kn: np.ndarray, shards: int | None = None) -> np.ndarray:
  """An order in which both halves cost alike, and both halves of each, while they are even.

  With `shards` only which shard has an example is as without, not where in the shard it is.
  """
  weight_K = (1 / _scale(cost_Kn)).tolist()
  parts = np.argsort(-cost_Kn[0], kind="stable")[None]  # (parts, examples), costliest first.
  while parts.shape[1] % 2 == 0 and (shards is None or len(parts) % shards):
    heavy, light = parts[:, ::2], parts[:, 1::2]
    gaps = np.moveaxis(cost_Kn[:, heavy] - cost_Kn[:, light], 0, -1).tolist()
    left = np.array([_left(of_part, weight_K) for of_part in gaps])
    split = np.stack([np.where(left, heavy, light), np.where(left, light, heavy)], 1)
    parts = split.reshape(-1, split.shape[2])
  # Parts of odd size may be cut further, by other numbers of devices: in no order of cost.
  mixed = np.random.default_rng(parts.shape[1]).permutation(parts.shape[1])
  return parts[:, mixed].reshape(-1)


def _left(gaps: list[list[float]], weight_K: list[float]) -> list[bool]:
  """Whether the heavier of each pair goes to the left half: where the left one is not ahead, in
  the kind of cost that is most uneven; and the lighter one, where it has more of that.
  """
  ahead_K, out, k = [0.0] * len(weight_K), [], 0
  for gap_K in gaps:
    if len(ahead_K) > 1:
      uneven_K = [abs(a * w) if gap else 0 for a, w, gap in zip(ahead_K, weight_K, gap_K)]
      k = uneven_K.index(max(uneven_K))
    left = ahead_K[k] <= 0 if gap_K[k] >= 0 else ahead_K[k] > 0
    out.append(left)
    for i, gap in enumerate(gap_K):
      ahead_K[i] += gap if left else -gap
  return out


def _scale(cost_Kn: np.ndarray) -> np.ndarray:
  """The deviation of each kind of cost; infinite where all cost the same."""
  deviation_K = cost_Kn.std(1)
  return np.where(deviation_K > 0, deviation_K, np.inf)
