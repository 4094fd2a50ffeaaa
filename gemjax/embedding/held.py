"""The part of a stack that a device holds, and what of a random draw is its own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Held(NamedTuple):
  """The part of a stack that this device holds: `rows` rows from `share * rows` on, and `width`
  columns from `column_share * width` on. The shares are the device's place on the mesh, traced.
  """

  rows: int
  all_rows: int
  share: jax.Array | int
  width: int
  all_columns: int
  column_share: jax.Array | int

  @classmethod
  def whole(cls, rows: int, width: int) -> Held:
    """All of a stack."""
    return cls(rows, rows, 0, width, width, 0)


def row_keys(key: jax.Array, held: Held, row_N: jax.Array) -> jax.Array:
  """A key a row, of its number in the whole stack, which may pass 2^32."""
  with jax.enable_x64(True):
    number_N = jnp.uint64(held.share) * held.rows + row_N.astype(jnp.uint64)
    low_N, high_N = number_N.astype(jnp.uint32), (number_N >> 32).astype(jnp.uint32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, low_N)
  if held.all_rows <= 2**32:
    return keys
  return jax.vmap(jax.random.fold_in)(keys, high_N)


def own_columns(x_NW: jax.Array, held: Held) -> jax.Array:
  """Those of `x`, which has all columns, that this device holds."""
  if held.width == held.all_columns:
    return x_NW
  return jax.lax.dynamic_slice_in_dim(x_NW, held.column_share * held.width, held.width, 1)
