"""What is done to queries and keys before they meet: QK-norm and rotary positions.

Once an event and not once a pair of tiles, for a tile of keys is visited by up to T / 64 tiles of
queries: to normalise and turn it anew in each, without tensor cores, costs more than to write it
once. XLA fuses both into one pass. Letters: T rows, H heads, D width of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_EPS = 1e-6


def prepare(
  x_THD: jax.Array, gain_D: jax.Array | None, position_T: jax.Array, base: float | None
) -> jax.Array:
  """y = R(position) (x / sqrt(mean_d(x^2) + eps) * gain), in float32 or wider, then as x.

  R turns (x_d, x_{d + D/2}) by the angle position * base^(-2 d / D), so that q.k of turned rows
  depends on the difference of their positions alone; without a base it is 1, without a gain the
  norm is left out.

  Sources: QK-norm, arXiv 2302.05442, 2; RoFormer, arXiv 2104.09864.
  """
  if gain_D is not None:
    return _normed(base, x_THD, gain_D, position_T)
  return x_THD if base is None else _turned(_wide(x_THD), position_T, base).astype(x_THD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(base, x_THD, gain_D, position_T):
  return _normed_forward(base, x_THD, gain_D, position_T)[0]


def _normed_forward(base, x_THD, gain_D, position_T):
  x = _wide(x_THD)
  inverse_TH1 = jax.lax.rsqrt(_mean(x * x) + _EPS)
  y = _turned(x * inverse_TH1 * gain_D.astype(x.dtype), position_T, base).astype(x_THD.dtype)
  return y, (x_THD, inverse_TH1, gain_D, position_T, y)


def _normed_backward(base, kept, dy_THD):
  """dx = (u gain - n mean_d(dy y)) / rms with u = dy turned back and n = x / rms: turning keeps
  inner products, so that dy . y is that of both before they are turned, u gain . n.
  """
  x_THD, inverse_TH1, gain_D, position_T, y_THD = kept
  x, dy = _wide(x_THD), _wide(dy_THD)
  along_TH1 = _mean(dy * _wide(y_THD))
  u, n = _turned(dy, position_T, base, back=True), x * inverse_TH1
  dx = (u * gain_D.astype(x.dtype) - n * along_TH1) * inverse_TH1
  return dx.astype(x_THD.dtype), jnp.sum(u * n, axis=(0, 1)).astype(gain_D.dtype), None


_normed.defvjp(_normed_forward, _normed_backward)


def _mean(x_THD: jax.Array) -> jax.Array:
  """(T, H, 1); as a product on a CPU, where XLA sums short rows number by number."""
  share_D1 = jnp.full((x_THD.shape[-1], 1), 1 / x_THD.shape[-1], x_THD.dtype)
  return jax.lax.platform_dependent(
    x_THD,
    cpu=lambda x_THD: x_THD @ share_D1,
    default=lambda x_THD: jnp.mean(x_THD, axis=-1, keepdims=True),
  )


def _turned(
  x_THD: jax.Array, position_T: jax.Array, base: float | None, *, back: bool = False
) -> jax.Array:
  if base is None:
    return x_THD
  half = x_THD.shape[-1] // 2
  rate = base ** (-jnp.arange(half, dtype=x_THD.dtype) / half)
  angle = (position_T.astype(x_THD.dtype)[:, None] * rate)[:, None, :]
  cos, sin = jnp.cos(angle), -jnp.sin(angle) if back else jnp.sin(angle)
  first, second = x_THD[..., :half], x_THD[..., half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
