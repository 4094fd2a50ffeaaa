"""What a scale stands for, and the rounding of float32 to 8 bits by integers.

Written once, in jnp, for XLA and for the kernels: no conversion instruction is needed (sm_80 has
none for fp8), and all implementations and GPUs give the same bits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
SMALLEST_NORMAL = np.float32(2.0**-126)
_INFINITY = np.uint32(0x7F800000)  # Bits of float32.


def magnitude(x: jax.Array) -> jax.Array:
  """|x| float32 as it counts for a scale: 0 where it is not finite or, as on CPUs, subnormal."""
  size = jnp.abs(x)
  return jnp.where((size >= SMALLEST_NORMAL) & (size < np.float32(jnp.inf)), size, 0.0)


def scale_of(largest: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
  """(scale, 1 / scale): the smallest power of two, 2^-126 or more, with largest / scale <= the
  format's largest number; 1 for 0.
  """
  fraction, exponent = math.frexp(float(jnp.finfo(dtype).max))  # fraction 2^exponent.
  # One more where the mantissa is above that of the format's largest number, 1.75.
  above = np.uint32(2**23 - 1 - round((2 * fraction - 1) * 2**23))
  field = (_bits(largest) + above) >> np.uint32(23)
  field = jnp.maximum(field.astype(jnp.int32) - (exponent - 1), 1)
  field = jnp.where(largest > 0, field, 127).astype(jnp.uint32)
  return _float(field << np.uint32(23)), _float((np.uint32(254) - field) << np.uint32(23))


def rounded(x: jax.Array, inverse: jax.Array, noise: jax.Array | None, dtype) -> jax.Array:
  """uint8, the bits of x / scale in `dtype`: to nearest, ties to even, or down after adding noise.

      q = floor(|x| / (scale ulp) + noise / 2^32)     ulp = the distance of neighbours there

  Args:
    x: float32.
    inverse: 1 / scale, a power of two; broadcasts to x.
    noise: uint32, or None.
    dtype: The format.
  """
  info = jnp.finfo(dtype)
  x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)
  bits = _bits(x * inverse)
  size = bits & np.uint32(0x7FFFFFFF)
  mantissa = size & np.uint32(0x7FFFFF)
  exponent = (size >> np.uint32(23)).astype(jnp.int32) - (127 + info.minexp)
  # Bits below the format's: more of them for its subnormals. What is beyond 31 cannot matter, but
  # for a chance of 2^-31.
  below = (23 - info.nmant) + jnp.maximum(-exponent, 0)
  lost = jnp.clip(below - 31, 0, 31).astype(jnp.uint32)
  below = jnp.minimum(below, 31).astype(jnp.uint32)
  digits = (mantissa | np.uint32(0x800000)) >> lost
  if noise is None:
    half = (np.uint32(1) << (below - np.uint32(1))) - np.uint32(1)
    added = half + ((digits >> below) & np.uint32(1))
  else:
    added = noise >> (np.uint32(32) - below)
  # A carry runs into the exponent, as it should.
  code = (jnp.maximum(exponent, 0) << info.nmant).astype(jnp.uint32) + ((digits + added) >> below)
  infinity, nan = (0x7C, 0x7E) if dtype == jnp.float8_e5m2 else (0x7F, 0x7F)
  code = jnp.where(size == _INFINITY, np.uint32(infinity), code)
  code = jnp.where(size > _INFINITY, np.uint32(nan), code)
  return (code | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(jnp.uint8)


def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
