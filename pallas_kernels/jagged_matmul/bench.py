"""Rows times the matrix of their segment, beside the product of padded segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import case, timing
from pallas_kernels.jagged_matmul import shapes, triton
from pallas_kernels.jagged_matmul.api import jagged_matmul

BASELINE = "padded dense, with its gradients"


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every set of lengths: the product and both gradients, float32."""
  for shape, (length_S, width) in shapes.TIMED.items():
    length_S = length_S[:16] if quick else length_S
    yield {
      "op": "jagged_matmul",
      "shape": shape,
      "baseline": BASELINE,
      **_work(length_S, width),
      **_times(length_S, width),
    }


def _work(length_S: np.ndarray, width: int) -> dict[str, Any]:
  """Three products of equal size, whose kernels all visit the same tiles of rows."""
  T, S, tile = int(length_S.sum()), len(length_S), triton.ROWS
  visited = int((-(-length_S // tile)).sum())
  # x and dy are read twice, y and dx written; w is read twice, dw written.
  return {
    "flops_needed": 3 * 2 * T * width**2,
    "bytes_needed": 4 * (6 * T * width + 3 * S * width**2),
    "flops_visited": 3 * 2 * visited * tile * width**2,
    "tiles_visited": 3 * visited,
    "useful_tile_share": T / (visited * tile),
  }


def _times(length_S: np.ndarray, width: int) -> dict[str, float]:
  rng = np.random.default_rng(0)
  S, L = len(length_S), int(length_S.max())
  w_SKN = jnp.asarray(rng.standard_normal((S, width, width), np.float32))
  offsets_S1 = jnp.asarray(case.offsets(length_S))
  x_TK = jnp.asarray(rng.standard_normal((int(length_S.sum()), width), np.float32))
  x_SLK = jnp.asarray(rng.standard_normal((S, L, width), np.float32))

  def with_gradients(fn, *args):
    @jax.jit
    def both(*args):
      y, pullback = jax.vjp(fn, *args)
      return y, pullback(y)  # Any cotangent will do.

    return lambda: both(*args)

  ours = lambda name: lambda x, w: jagged_matmul(x, w, offsets_S1, implementation=name)
  return timing.beside(
    lambda name: with_gradients(ours(name), x_TK, w_SKN),
    with_gradients(jnp.matmul, x_SLK, w_SKN),
  )
