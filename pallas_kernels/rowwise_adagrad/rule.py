"""The step of a row, written once for every implementation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import noise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
  """What is static of the step."""

  eps: float
  l2: float
  accumulated: float

  def step(self, w_BW, v_B, grad_BW, lr, width: int):
    """(new w, new v); columns from `width` on hold zeros and count for nothing."""
    if self.l2:
      grad_BW += self.l2 * w_BW
    v_B += jnp.sum(grad_BW * grad_BW, axis=1) * (1 / width)
    rate_B = lr / (jnp.sqrt(v_B * (1 / self.accumulated)) + self.eps)
    return w_BW - rate_B[:, None] * grad_BW, v_B


def stored(x_BW: jax.Array, row_B: jax.Array, words: jax.Array | None, dtype) -> jax.Array:
  """`x` as a table of `dtype` keeps it: to nearest, or with noise by `words` and the row.

  bfloat16 by adding 16 random bits below the kept ones and cutting. Not finite stays as it is.
  """
  if words is None:
    return x_BW.astype(dtype)
  column_W = jax.lax.broadcasted_iota(jnp.int32, (1, x_BW.shape[1]), 1)
  noise_BW = noise.random_bits(words[0], words[1], row_B[:, None], column_W) >> np.uint32(16)
  bits_BW = jax.lax.bitcast_convert_type(x_BW, jnp.uint32)
  cut_BW = jax.lax.bitcast_convert_type((bits_BW + noise_BW) & np.uint32(0xFFFF0000), jnp.float32)
  finite_BW = (bits_BW & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
  return jnp.where(finite_BW, cut_BW, x_BW).astype(dtype)
