"""What is done to queries and keys before they meet: QK-norm and rotary positions.

Once an event and not once a pair of tiles, for a tile of keys is visited by up to T / 64 tiles of
queries: to normalise and turn it anew in each, without tensor cores, costs more than to write it
once. XLA fuses both into one pass. Letters: T rows, H heads, D width of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x_THD: jax.Array, gain_D: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(mean_d(x^2) + eps) * gain, in float32 or wider (QK-norm: arXiv 2302.05442, 2)."""
  wide = jnp.promote_types(x_THD.dtype, jnp.float32)
  x = x_THD.astype(wide)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return (x * gain_D.astype(wide)).astype(x_THD.dtype)


def rotate(x_THD: jax.Array, position_T: jax.Array, base: float) -> jax.Array:
  """Turns (x_d, x_{d + D/2}) by the angle position * base^(-2 d / D) (RoFormer, arXiv 2104.09864).

  So that q.k of rotated rows depends on the difference of their positions alone.
  """
  wide = jnp.promote_types(x_THD.dtype, jnp.float32)
  half = x_THD.shape[-1] // 2
  rate = base ** (-jnp.arange(half, dtype=wide) / half)
  angle = (position_T.astype(wide)[:, None] * rate)[:, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x_THD[..., :half].astype(wide), x_THD[..., half:].astype(wide)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_THD.dtype)
