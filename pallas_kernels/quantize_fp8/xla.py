"""Quantisation in plain JAX: two passes that XLA fuses, the largest and the rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import noise
from pallas_kernels.quantize_fp8 import form, layout


def quantize(granularity, dtype, x, words):
  """(values, scales)."""
  x = x.astype(jnp.float32)
  scales, inverse = form.scale_of(layout.largest_of(form.magnitude(x), granularity), dtype)
  random = None
  if words is not None:
    random = noise.random_bits(words[0], words[1], *layout.places(x.shape))
  bits = form.rounded(x, layout.spread(inverse, x.shape), random, dtype)
  return jax.lax.bitcast_convert_type(bits, dtype), scales
