"""Pooling of events beside pooling of padded sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import case, timing
from pallas_kernels import rows as moved
from pallas_kernels.jagged_pool import shapes, triton
from pallas_kernels.jagged_pool.api import jagged_pool

WIDTH = shapes.TIMED_WIDTH
PADDED = "padded dense, masked, with its gradient"


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every mode and set of lengths; forward and backward together."""
  for shape, length_S, L in timed_lengths(quick):
    for mode in shapes.KERNELS:
      k = min(shapes.LAST, L) if mode == "last" else None
      pool = functools.partial(jagged_pool, mode=mode, k=k)
      padded = lambda x, length_S, mode=mode, k=k: _padded(x, length_S, mode, k)
      S = len(length_S)
      offsets, x_TW, x_SLW = events(length_S, L)
      yield {
        "op": "jagged_pool",
        "shape": f"{mode}_{shape}",
        "baseline": PADDED,
        **_work(length_S, mode, S * k if k else S),
        **timing.beside(
          lambda name, pool=pool, x=x_TW, o=offsets: with_gradient(
            functools.partial(pool, implementation=name), (x,), o
          ),
          with_gradient(padded, (x_SLW,), jnp.asarray(length_S)),
        ),
      }


def timed_lengths(quick: bool) -> Iterator[tuple[str, np.ndarray, int]]:
  """Name, lengths and padded length of what is timed; a sixteenth of the events where quick."""
  for shape, (length_S, L) in shapes.TIMED.items():
    yield (shape, np.maximum(length_S // 16, 1), L // 16) if quick else (shape, length_S, L)


def events(length_S: np.ndarray, L: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Offsets, rows side by side, and as many padded ones; the rows need not be the same."""
  rng = np.random.default_rng(0)
  x_TW = rng.standard_normal((length_S.sum(), WIDTH), np.float32)
  x_SLW = rng.standard_normal((len(length_S), L, WIDTH), np.float32)
  return jnp.asarray(case.offsets(length_S)), jnp.asarray(x_TW), jnp.asarray(x_SLW)


def with_gradient(fn: Callable, xs: tuple, *others: Any) -> Callable[[], Any]:
  """A call of fn(*xs, *others) and of its gradient with respect to xs, compiled."""

  @jax.jit
  def both(xs, others):
    y, pullback = jax.vjp(lambda *xs: fn(*xs, *others), *xs)
    return y, pullback(y)  # Any cotangent will do.

  return lambda: both(xs, others)


def work(flops: float, size: float, needed: float, visited: float, tile: int) -> dict[str, Any]:
  """The counted columns, from rows that are needed and rows of the tiles that are visited."""
  return {
    "flops_needed": flops,
    "bytes_needed": size,
    "flops_visited": flops * visited / needed,
    "tiles_visited": visited // tile,
    "useful_tile_share": needed / visited,
  }


def move_work(read: int, written: Iterator[int]) -> dict[str, Any]:
  """`work` of kernels that copy: `read` rows in all, tiles over each of the arrays written."""
  written = list(written)
  tile = moved.ELEMENTS // WIDTH
  visited = sum(-(-rows // tile) * tile for rows in written)
  return work(0, 4 * WIDTH * (read + sum(written)), sum(written), visited, tile)


def pool_rows(length_S: np.ndarray, tile: int) -> int:
  """Rows of the tiles that a pooling visits: those of the events, and those of split segments."""
  T = int(length_S.sum())
  chunks_S = -(-length_S // triton.chunk_size(T))
  split_S = np.where(chunks_S > 1, chunks_S, 0)
  return int(sum((-(-n_S // tile) * tile).sum() for n_S in (length_S, split_S)))


def _work(length_S: np.ndarray, mode: str, pooled: int) -> dict[str, Any]:
  T = int(length_S.sum())
  if mode == "last":
    kept = int(np.minimum(length_S, pooled // len(length_S)).sum())
    return move_work(2 * kept, [pooled, T])
  tile = triton.MAX_ROWS if mode == "max" else triton.ROWS
  back = triton.ROWS if mode == "max" else moved.ELEMENTS // WIDTH
  visited = pool_rows(length_S, tile) + pl.cdiv(T, back) * back
  # The events are read and their gradient is written; a row of each segment goes both ways.
  return work(T * WIDTH, 4 * WIDTH * 2 * (T + pooled), 2 * T, visited, tile)


def _padded(x_SLW: jax.Array, length_S: jax.Array, mode: str, k: int | None) -> jax.Array:
  """What a JAX user writes for padded sequences."""
  place_L = jnp.arange(x_SLW.shape[1])
  there_SL1 = (place_L < length_S[:, None])[..., None]
  if mode == "last":
    place_SK = length_S[:, None] - k + jnp.arange(k)
    x_SKW = jnp.take_along_axis(x_SLW, jnp.maximum(place_SK, 0)[..., None], axis=1)
    return jnp.where((place_SK >= 0)[..., None], x_SKW, 0)
  if mode == "max":
    return jnp.where(there_SL1, x_SLW, -jnp.inf).max(1)
  sum_SW = jnp.where(there_SL1, x_SLW, 0).sum(1)
  return sum_SW if mode == "sum" else sum_SW / length_S[:, None]
