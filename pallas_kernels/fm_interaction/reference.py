"""fm_interaction as the formula says, in float32 or, of float64, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(x_BND, y, scale_F, bias_F, *, eps: float) -> jax.Array:
  """(B, N, D), (N, K) or (B, N, K) -> (B, N * K)."""
  exact = jnp.promote_types(x_BND.dtype, jnp.float32)
  highest = jax.lax.Precision.HIGHEST
  x = x_BND.astype(exact)
  y = y.astype(x_BND.dtype).astype(exact)
  pairs = jnp.matmul(
    x, jnp.matmul(x.swapaxes(1, 2), y, precision=highest), precision=highest
  ).reshape(len(x), -1)
  out = pairs - pairs.mean(1, keepdims=True)
  out = out / jnp.sqrt(jnp.square(out).mean(1, keepdims=True) + eps)
  if scale_F is not None:
    out = out * scale_F.astype(exact)
  if bias_F is not None:
    out = out + bias_F.astype(exact)
  return out.astype(x_BND.dtype)


def backward(x_BND, y, scale_F, bias_F, gradient_BF, *, eps: float):
  """Gradients of x, y, scale and bias, by JAX."""
  _, vjp = jax.vjp(lambda *inputs: forward(*inputs, eps=eps), x_BND, y, scale_F, bias_F)
  return vjp(gradient_BF)
