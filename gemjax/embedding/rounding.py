"""Weights in fewer bits than they are computed in: rounding whose mean is exact, scales of rows.

A step of an optimiser is far below the spacing of narrow weights: rounded to the nearest it would
vanish, every time. Rounded up with the probability of what would be cut it counts in the mean.

float8_e4m3fn has 3 bits behind the leading one and reaches from 2^-9 to 448. A row's scale is the
smallest power of two with max |x| <= 448 scale, so that scaling rounds nothing and a row whose
maximum stays within its octave keeps all of its bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FLOAT8 = "float8_e4m3fn"
_BITS, _LEAST = 3, -6  # Of the fraction; the exponent from which on numbers are equidistant.


def to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
  """bfloat16 by adding 16 random bits below the kept ones and cutting: E[result] = x.

  Non-finite values pass unchanged. `noise` is uint16 of the shape of `x`.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  cut_bits = (bits + noise.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
  cut = jax.lax.bitcast_convert_type(cut_bits, jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def row_scales(x_UW: jax.Array, axis: str | None = None) -> jax.Array:
  """(U,) float32, 2^k: the smallest with max |x| <= 448 * 2^k; 1 for a row of zeros.

  Where `axis` is given, a device of it holds some of the columns.
  """
  most_U = jnp.max(jnp.abs(x_UW), axis=1)
  most_U = jax.lax.pmax(most_U, axis) if axis else most_U
  part_U, exponent_U = jnp.frexp(most_U)  # part in [1/2, 1); 448 = 7/8 * 2^9.
  scale_U = jnp.ldexp(jnp.ones_like(most_U), exponent_U - jnp.where(part_U <= 7 / 8, 9, 8))
  # A float32 below 2^-126 would count as zero.
  usable_U = jnp.isfinite(most_U) & (most_U >= 2.0**-117)
  return jnp.where(usable_U, scale_U, 1.0)


def quantize(x_UW: jax.Array, scales_U: jax.Array, noise_UW: jax.Array | None) -> jax.Array:
  """(U, W) float8 q with q scale = x in the mean over the noise, one of both neighbours of x.

  Args:
    x_UW: float32. What is not finite becomes NaN.
    scales_U: Of `row_scales`.
    noise_UW: uint32; without it the nearest neighbour.
  """
  y_UW = x_UW / scales_U[:, None]
  if noise_UW is None:
    return y_UW.astype(FLOAT8)
  exponent_UW = (jax.lax.bitcast_convert_type(y_UW, jnp.int32) >> 23 & 0xFF) - 127
  spacing_UW = jnp.ldexp(jnp.ones_like(y_UW), jnp.maximum(exponent_UW, _LEAST) - _BITS)
  chance_UW = (noise_UW >> 8).astype(jnp.float32) * 2.0**-24  # In [0, 1).
  # floor(|y| / spacing) is below 16, and so is exact what is left of it.
  steps_UW = jnp.abs(y_UW) / spacing_UW
  whole_UW = jnp.floor(steps_UW)
  up_UW = chance_UW < steps_UW - whole_UW
  rounded_UW = jnp.sign(y_UW) * (whole_UW + up_UW) * spacing_UW
  return jnp.where(jnp.isfinite(y_UW), rounded_UW, jnp.nan).astype(FLOAT8)
