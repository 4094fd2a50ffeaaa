"""The formula in float64, with nothing of the bits in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import noise
from pallas_kernels.quantize_fp8 import layout


def quantize(granularity, dtype, x, words):
  """(values, scales), all of it in float64."""
  info = jnp.finfo(dtype)
  with jax.enable_x64(True):
    x = x.astype(jnp.float64)
    x = jnp.where(jnp.abs(x) < 2.0**-126, 0.0, x)
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)
    largest = layout.largest_of(size, granularity)
    # frexp: largest = fraction 2^exponent with a fraction in [0.5, 1); the format's is 0.875.
    fraction, exponent = jnp.frexp(largest)
    top_fraction, top_exponent = jnp.frexp(jnp.float64(info.max))
    exponent = exponent - top_exponent + (fraction > top_fraction)
    scales = jnp.where(largest > 0, _power(jnp.maximum(exponent, -126)), 1.0)
    y = x / layout.spread(scales, x.shape)
    _, exponent = jnp.frexp(jnp.abs(y))
    ulp = _power(jnp.maximum(exponent - 1, int(info.minexp)) - info.nmant)
    steps = jnp.abs(y) / ulp
    if words is None:
      steps = jnp.round(steps)  # Ties to even.
    else:
      random = noise.random_bits(words[0], words[1], *layout.places(x.shape))
      steps = jnp.floor(steps + random.astype(jnp.float64) / 2.0**32)
    rounded = jnp.where(jnp.isfinite(y), jnp.sign(y) * steps * ulp, y)
    return rounded.astype(dtype), scales.astype(jnp.float32)


def _power(exponent: jax.Array) -> jax.Array:
  return jnp.ldexp(jnp.float64(1.0), exponent)
