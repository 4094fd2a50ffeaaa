"""How high a ranker puts the one item that was right.

Letters: B queries, V items, N queries of a whole split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def ranks(score_BV: jax.Array, target_B: jax.Array) -> jax.Array:
  """int32 rank of each target among all items, from 1; of equal scores the target comes last.

  So does a score that is not a number. An item is left out by a score of -inf.
  """
  score_B1 = jnp.take_along_axis(score_BV, target_B[:, None], axis=1)
  return jnp.sum(~(score_BV < score_B1), axis=1, dtype=jnp.int32)


def ranking(rank_N: np.ndarray) -> dict[str, float]:
  """Means over queries, each of one right item at rank r.

  HR@k = [r <= k];   NDCG@k = [r <= k] / log2(r + 1);   MRR = 1 / r
  """
  rank_N = np.asarray(rank_N, np.float64)
  within = lambda k: rank_N <= k
  return {
    "hr@10": float(np.mean(within(10))),
    "ndcg@10": float(np.mean(within(10) / np.log2(rank_N + 1))),
    "hr@50": float(np.mean(within(50))),
    "mrr": float(np.mean(1 / rank_N)),
  }
