"""The formula of `api`, a matrix for every row, in plain JAX; derivatives are JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def jagged_matmul(x_TK: jax.Array, w_SKN: jax.Array, offsets_S1: jax.Array) -> jax.Array:
  exact = jnp.promote_types(x_TK.dtype, jnp.float32)
  segment_T = jnp.searchsorted(offsets_S1, jnp.arange(len(x_TK)), side="right") - 1
  inside_T = (segment_T >= 0) & (segment_T < len(w_SKN))
  x_TK = jnp.where(inside_T[:, None], x_TK.astype(exact), 0)
  w_TKN = w_SKN.astype(exact)[jnp.where(inside_T, segment_T, 0)]
  y_TN = jnp.einsum("tk,tkn->tn", x_TK, w_TKN, precision=jax.lax.Precision.HIGHEST)
  # Here too, so that a NaN of dy in rows of nobody meets no zero: their product is NaN.
  return jnp.where(inside_T[:, None], y_TN, 0).astype(w_SKN.dtype)
