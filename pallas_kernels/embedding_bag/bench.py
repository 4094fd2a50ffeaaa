"""Bags of ids beside padded bags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import case, timing
from pallas_kernels import rows as moved
from pallas_kernels.embedding_bag import triton
from pallas_kernels.embedding_bag.api import embedding_bag, embedding_bag_gradients
from pallas_kernels.jagged_pool import bench as pool_bench
from pallas_kernels.jagged_pool import triton as pool_triton

WIDTH = pool_bench.WIDTH
TABLE = 50_000  # Rows.
BASELINE = "padded ids, masked, gradients by row"


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every set of lengths: the weighted mean, gradients of rows and of weights."""
  for shape, length_S, L in pool_bench.timed_lengths(quick):
    rng = np.random.default_rng(0)
    N, S = int(length_S.sum()), len(length_S)
    table_RW = jnp.asarray(rng.standard_normal((TABLE, WIDTH), np.float32))
    bags = [
      (jnp.asarray(rng.integers(0, TABLE, shape, np.int32)), jnp.asarray(rng.random(shape, "f")))
      for shape in ((N,), (S, L))
    ]
    ours = jax.jit(_ours, static_argnums=0)
    padded = jax.jit(_padded)
    jagged_args = (table_RW, *bags[0], jnp.asarray(case.offsets(length_S)))
    padded_args = (table_RW, *bags[1], jnp.asarray(length_S))
    yield {
      "op": "embedding_bag",
      "shape": f"weighted_mean_{shape}",
      "baseline": BASELINE,
      **_work(length_S),
      **timing.beside(
        lambda name, ours=ours, args=jagged_args: lambda: ours(name, *args),
        lambda padded=padded, args=padded_args: padded(*args),
      ),
    }


def _work(length_S: np.ndarray) -> dict[str, Any]:
  """Forward; rows' gradient; weights' gradient."""
  N = int(length_S.sum())
  visited = pool_bench.pool_rows(length_S, pool_triton.ROWS)
  for tile in (moved.ELEMENTS // WIDTH, triton.ROWS):
    visited += -(-N // tile) * tile
  # Products and sums, forward and for the weights; a product for each row's gradient. The table's
  # rows are read twice, the rows' gradients written; ids and weights, read and written.
  size = 4 * (WIDTH * (3 * N + 2 * len(length_S)) + 5 * N)
  return pool_bench.work(5 * N * WIDTH, size, 3 * N, visited, pool_triton.ROWS)


def _ours(implementation, table_RW, id_N, weight_N, offsets_S1):
  args = (table_RW, id_N, offsets_S1, weight_N)
  y_SW = embedding_bag(*args, mode="mean", implementation=implementation)
  return y_SW, embedding_bag_gradients(y_SW, *args, mode="mean", implementation=implementation)


def _padded(table_RW, id_SL, weight_SL, length_S):
  """What a JAX user writes for padded bags who wants no dense gradient either."""
  there_SL = jnp.arange(id_SL.shape[1]) < length_S[:, None]

  def pool(row_SLW, weight_SL):
    weight_SL = jnp.where(there_SL, weight_SL, 0)
    return jnp.einsum("slw,sl->sw", row_SLW, weight_SL) / length_S[:, None]

  y_SW, pullback = jax.vjp(pool, table_RW[id_SL], weight_SL)
  return y_SW, pullback(y_SW)
