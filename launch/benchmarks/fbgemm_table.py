"""FBGEMM's embedding table on the CPU, a peer of suite `train_step`.

Forward is a lookup of M rows, backward sums duplicates and applies exact row-wise AdaGrad.
Letters: M looked-up rows, R rows, D width.
"""

from __future__ import annotations

import time

import numpy as np

try:
  import torch
  from fbgemm_gpu.split_embedding_configs import EmbOptimType
  from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
  )
  from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
  )
except ImportError as error:
  raise ImportError("this suite needs FBGEMM: pip install 'gemjax[benchmark]'") from error

LOOKUPS, ROWS, DIM = 160_000, 1_000_000, 64
RATE, EPS = 0.05, 1e-8


def draw_ids(rng: np.random.Generator, kind: str, rows: int = ROWS, lookups: int = LOOKUPS):
  """int64 ids: `uniform`, or `zipf` with P(rank k) ~ 1 / k and ranks scattered over the rows."""
  if kind == "uniform":
    return rng.integers(0, rows, lookups)
  cumulative = np.cumsum(1 / np.arange(1, rows + 1))
  rank = np.searchsorted(cumulative, rng.random(lookups) * cumulative[-1])
  return rng.permutation(rows)[rank]


class FbgemmTable:
  """One table of `weights_RD`, one id a bag."""

  def __init__(self, weights_RD: np.ndarray, *, learning_rate: float = RATE, eps: float = EPS):
    rows, dim = weights_RD.shape
    self.table = SplitTableBatchedEmbeddingBagsCodegen(
      [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
      optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
      learning_rate=learning_rate,
      eps=eps,
      # One id a bag: the same result as PoolingMode.NONE, whose CPU backward is many times slower.
      pooling_mode=PoolingMode.SUM,
      bounds_check_mode=BoundsCheckMode.NONE,  # As fast as it goes: the ids are known to be good.
    )
    self.table.split_embedding_weights()[0].copy_(torch.from_numpy(weights_RD))

  def step(self, ids_M: np.ndarray, grad_MD: np.ndarray) -> tuple[float, float]:
    """Seconds of the lookup, and of the backward pass that updates the table with `grad_MD`."""
    ids, offsets = torch.from_numpy(ids_M), torch.arange(len(ids_M) + 1)
    grad = torch.from_numpy(grad_MD)
    start = time.perf_counter()
    rows_MD = self.table(ids, offsets)
    middle = time.perf_counter()
    rows_MD.backward(grad)
    return middle - start, time.perf_counter() - middle

  def weights(self) -> np.ndarray:
    return self.table.split_embedding_weights()[0].numpy(force=True).copy()
