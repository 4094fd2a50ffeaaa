"""Jagged arrays side by side beside padded ones, whose holes must be closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.jagged_concat.api import jagged_concat
from pallas_kernels.jagged_pool import bench as pool_bench

BASELINE = "padded dense, holes closed, gradient by JAX"


def rows(quick: bool) -> Iterator[dict[str, Any]]:
  """A row for every set of lengths, of two arrays; forward and backward together."""
  for shape, length_S, L in pool_bench.timed_lengths(quick):
    offsets, x_TW, x_SLW = pool_bench.events(length_S, L)
    lengths, T = jnp.asarray(length_S), len(x_TW)
    ours = lambda name, x=x_TW, offsets=offsets: pool_bench.with_gradient(
      lambda x, z, offsets: jagged_concat((x, z), (offsets, offsets), implementation=name)[0],
      (x, x),
      offsets,
    )
    theirs = pool_bench.with_gradient(_padded, (x_SLW, x_SLW), lengths)
    yield {
      "op": "jagged_concat",
      "shape": f"two_{shape}",
      "baseline": BASELINE,
      **pool_bench.move_work(4 * T, [2 * T, T, T]),
      **timing.beside(ours, theirs),
    }


def _padded(x_SLW: jax.Array, z_SLW: jax.Array, length_S: jax.Array) -> jax.Array:
  """What a JAX user writes: row i of a segment is of x, then of z, then padding."""
  L = x_SLW.shape[1]
  place_2L = jnp.arange(2 * L)
  length_S1 = length_S[:, None]
  from_S2L = jnp.where(place_2L < length_S1, place_2L, place_2L - length_S1 + L)
  both_S2LW = jnp.concatenate([x_SLW, z_SLW], axis=1)
  y_S2LW = jnp.take_along_axis(both_S2LW, jnp.minimum(from_S2L, 2 * L - 1)[..., None], axis=1)
  return jnp.where((place_2L < 2 * length_S1)[..., None], y_S2LW, 0)
