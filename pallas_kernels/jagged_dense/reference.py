"""The formulas of `api`, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def jagged_to_dense(
  x_TW: jax.Array, offsets_S1: jax.Array, max_length: int, padding_value: float
) -> jax.Array:
  row_SL = offsets_S1[:-1, None] + jnp.arange(max_length)
  x_SLW = x_TW.at[row_SL].get(mode="fill", fill_value=0)
  return jnp.where((row_SL < offsets_S1[1:, None])[..., None], x_SLW, padding_value).astype(
    x_TW.dtype
  )


def dense_to_jagged(y_SLW: jax.Array, offsets_S1: jax.Array, rows: int) -> jax.Array:
  row_SL = offsets_S1[:-1, None] + jnp.arange(y_SLW.shape[1])
  # A row behind the end of its segment goes to a row that does not exist.
  row_SL = jnp.where(row_SL < offsets_S1[1:, None], row_SL, rows)
  x_TW = jnp.zeros((rows, y_SLW.shape[2]), y_SLW.dtype)
  return x_TW.at[row_SL].set(y_SLW, mode="drop")
