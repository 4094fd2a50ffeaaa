"""Plain XLA: tiles of rows, some at a time in a loop that ends where the rows do.

Letters: S segments, T rows, K and N widths; C tiles at a time, B rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.jagged_matmul import tiles


def block(rows: int, segments: int) -> int:
  """B, measured on a CPU: short segments must not be all padding, long ones not all matrices."""
  return 16 if rows < 32 * segments else 32


def multiply(x_TK, w_SKN, offsets_S1, *, transposed: bool) -> jax.Array:
  """y_TN = x w[s]; with `transposed`, of w (S, N, K)."""
  products = "cbk,cnk->cbn" if transposed else "cbk,ckn->cbn"
  N = w_SKN.shape[1 if transposed else 2]

  def body(segment_C, row_CB, inside_CB, y_TN):
    w_CKN = _wide(w_SKN.at[segment_C].get(mode="promise_in_bounds"))
    y_CBN = jnp.einsum(products, _take(x_TK, row_CB, inside_CB), w_CKN).astype(y_TN.dtype)
    return y_TN.at[jnp.where(inside_CB, row_CB, len(x_TK))].set(y_CBN, mode="drop")

  return _over_tiles(offsets_S1, x_TK, w_SKN[0].size, body, jnp.zeros((len(x_TK), N), x_TK.dtype))


def outer(x_TK, y_TN, offsets_S1) -> jax.Array:
  """w_SKN = the sum of xᵀ y over the rows of s, in float32 or wider until it is whole."""
  shape = (len(offsets_S1) - 1, x_TK.shape[1], y_TN.shape[1])

  def body(segment_C, row_CB, inside_CB, w_SKN):
    x_CBK, y_CBN = (_take(a, row_CB, inside_CB) for a in (x_TK, y_TN))
    # XLA for CPUs multiplies as they lie what is summed over the first operand's last axis.
    x_CKB = jax.lax.optimization_barrier(jnp.swapaxes(x_CBK, 1, 2))
    return w_SKN.at[segment_C].add(
      jnp.einsum("ckb,cbn->ckn", x_CKB, y_CBN), mode="promise_in_bounds"
    )

  zeros = jnp.zeros(shape, _wide(x_TK).dtype)
  return _over_tiles(offsets_S1, x_TK, shape[1] * shape[2], body, zeros).astype(x_TK.dtype)


def _wide(x: jax.Array) -> jax.Array:
  # XLA has no product of bf16 tiles with float32 sums on a CPU.
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _take(x_TK: jax.Array, row_CB: jax.Array, inside_CB: jax.Array) -> jax.Array:
  """Rows in full precision; 0 where not inside, whatever lies there."""
  return jnp.where(inside_CB[..., None], _wide(x_TK.at[row_CB].get(mode="clip")), 0)


def _over_tiles(offsets_S1, x_TK: jax.Array, size: int, body: Callable, carry: jax.Array):
  """carry = body(segment_C, row_CB, inside_CB, carry) for the next C tiles, while there are any."""
  S, T = len(offsets_S1) - 1, len(x_TK)
  B = block(T, S)
  C = max(1, 2**17 // size)
  cut = tiles.cut(offsets_S1, T, B)
  used = jnp.sum(cut.begin_N < cut.end_N, dtype=jnp.int32)
  chunks = -(-len(cut.begin_N) // C)
  room = chunks * C - len(cut.begin_N)
  cut = tiles.Tiles(*(jnp.pad(a, (0, room)).reshape(chunks, C) for a in cut))

  def step(i, carry):
    row_CB = cut.begin_N[i][:, None] + jnp.arange(B, dtype=jnp.int32)
    return body(cut.segment_N[i], row_CB, row_CB < cut.end_N[i][:, None], carry)

  return jax.lax.fori_loop(0, -(-used // C), step, carry)
