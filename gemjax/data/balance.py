"""Balance: which examples share a batch, and which a device, decided by what they cost.

`alike` deals blocks to windows, whose mean costs differ where the file is in order of time.
`groups` deals the examples of a window to its batches, `halves` those of a batch to its halves,
quarters and so on, so that every power of two of devices gets parts of nearly equal cost and the
stream does not depend on the mesh. Both deal from the costliest example down, and give the
costlier of those dealt together to the group that has least so far: what the heavy ones leave
uneven, the many light ones even out.

Letters: n examples, G groups.
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


def groups(cost_n: np.ndarray, sizes_G: list[int], rng: np.random.Generator) -> np.ndarray:
  """An order of the examples in which the first sizes[0], the next sizes[1], .. cost alike.

  Every row of the deal has one example for each group, for a group of a fraction of the largest
  size only in that fraction of the rows, and has examples of like cost, up to `JITTER`: so that
  one window gives new groups in every epoch.
  """
  sizes_G = np.asarray(sizes_G)
  about_n = cost_n * rng.uniform(1 - JITTER, 1 + JITTER, len(cost_n))
  falling_n = np.argsort(-about_n, kind="stable")
  group_n = np.empty(len(cost_n), np.int64)
  excess_G = np.zeros(len(sizes_G))  # Cost above the mean of the rows in which a group took part.
  rows, first = int(sizes_G.max()), 0
  for r in range(rows):
    dealt = np.flatnonzero(sizes_G * (r + 1) // rows > sizes_G * r // rows)
    row = falling_n[first : first + len(dealt)]
    row = row[np.argsort(-cost_n[row], kind="stable")]
    dealt = rng.permutation(dealt)
    dealt = dealt[np.argsort(excess_G[dealt], kind="stable")]
    group_n[row] = dealt
    excess_G[dealt] += cost_n[row] - cost_n[row].mean()
    first += len(dealt)
  shuffled_n = rng.permutation(len(cost_n))  # Within a group in random order.
  return shuffled_n[np.argsort(group_n[shuffled_n], kind="stable")]


def halves(cost_n: np.ndarray) -> np.ndarray:
  """An order in which both halves cost alike, and both halves of each, while they are even."""
  parts = np.argsort(-cost_n, kind="stable")[None]  # (parts, examples), each from the costliest.
  while parts.shape[1] % 2 == 0:
    heavy, light = parts[:, ::2], parts[:, 1::2]
    left = np.array([_left(gaps) for gaps in (cost_n[heavy] - cost_n[light]).tolist()])
    split = np.stack([np.where(left, heavy, light), np.where(left, light, heavy)], 1)
    parts = split.reshape(-1, split.shape[2])
  # Parts of odd size may be cut further, by other numbers of devices: in no order of cost.
  mixed = np.random.default_rng(parts.shape[1]).permutation(parts.shape[1])
  return parts[:, mixed].reshape(-1)


def _left(gaps: list[float]) -> list[bool]:
  """Whether the heavier of each pair goes to the left half: where the left one is not ahead."""
  ahead, out = 0.0, []
  for gap in gaps:
    out.append(ahead <= 0)
    ahead += gap if ahead <= 0 else -gap
  return out
