"""Rows and their gradients between devices, in fewer bits than they are computed in.

Letters: N rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemjax.embedding.rounding import FLOAT8, quantize, row_scales


def moved(x_NW: jax.Array, dtype: str, move: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`move(x)` of the nearest numbers of `dtype`, if it is narrower than x.

  float8_e4m3fn has a scale a row, a power of two: what float8 tables hold passes unchanged. It
  arrives as bfloat16, which has all of its values.

  Args:
    x_NW: Floats.
    dtype: float32, bfloat16 or float8_e4m3fn.
    move: Collectives that take whole rows to other places, of any width and type.
  """
  if x_NW.dtype.itemsize <= jnp.dtype(dtype).itemsize:
    return move(x_NW)
  if dtype != FLOAT8:
    return move(x_NW.astype(dtype))
  x_NW = x_NW.astype(jnp.float32)
  scales_N = row_scales(x_NW)
  words_NW = jax.lax.bitcast_convert_type(quantize(x_NW, scales_N, None), jnp.uint8)
  got_NW = jax.lax.bitcast_convert_type(move(words_NW), FLOAT8).astype(jnp.bfloat16)
  return got_NW * move(scales_N[:, None]).astype(jnp.bfloat16)
