"""The conversions beside what a JAX user writes: indices of all padded places."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.jagged_dense.api import dense_to_jagged, jagged_to_dense
from pallas_kernels.jagged_pool import bench as pool_bench

BASELINE = "indices of all padded places, gradient by JAX"


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every conversion and set of lengths; forward and backward together."""
  for shape, length_S, L in pool_bench.timed_lengths(quick):
    offsets, x_TW, x_SLW = pool_bench.events(length_S, L)
    T, S = len(x_TW), len(length_S)
    fns = {
      "to_dense": (
        functools.partial(jagged_to_dense, max_length=L),
        lambda x, offsets, L=L: _to_dense(x, offsets, L),
        x_TW,
      ),
      "to_jagged": (
        functools.partial(dense_to_jagged, rows_out=T),
        lambda y, offsets, T=T: _to_jagged(y, offsets, T),
        x_SLW,
      ),
    }
    for name, (ours, theirs, x) in fns.items():
      yield {
        "op": "jagged_dense",
        "shape": f"{name}_{shape}",
        "baseline": BASELINE,
        **pool_bench.move_work(2 * T, [S * L, T]),
        **timing.beside(
          lambda name, ours=ours, x=x, o=offsets: pool_bench.with_gradient(
            functools.partial(ours, implementation=name), (x,), o
          ),
          pool_bench.with_gradient(theirs, (x,), offsets),
        ),
      }


def _places(offsets_S1: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
  row_SL = offsets_S1[:-1, None] + jnp.arange(L)
  return row_SL, row_SL < offsets_S1[1:, None]


def _to_dense(x_TW, offsets_S1, L):
  row_SL, there_SL = _places(offsets_S1, L)
  return jnp.where(there_SL[..., None], x_TW[row_SL], 0)


def _to_jagged(y_SLW, offsets_S1, T):
  row_SL, there_SL = _places(offsets_S1, y_SLW.shape[1])
  x_TW = jnp.zeros((T, y_SLW.shape[2]), y_SLW.dtype)
  return x_TW.at[jnp.where(there_SL, row_SL, T)].set(y_SLW, mode="drop")
