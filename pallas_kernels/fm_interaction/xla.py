"""fm_interaction in plain XLA: the cheaper association, products in x's dtype, norm in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def gram_is_cheaper(units: int, width: int, rank: int) -> bool:
  """Whether (X Xᵀ) Y takes fewer products than X (Xᵀ Y): N² (D + K) < 2 N D K."""
  return units * (width + rank) < 2 * width * rank


def forward(x_BND, y, scale_F, bias_F, *, eps: float) -> jax.Array:
  """(B, N, D), (N, K) or (B, N, K) -> (B, N * K)."""
  dtype = x_BND.dtype
  exact = jnp.promote_types(dtype, jnp.float32)
  einsum = functools.partial(jnp.einsum, preferred_element_type=exact)
  # One product for each example, shared Y or not: the CPU is faster at these.
  y_BNK = jnp.broadcast_to(y.astype(dtype), (len(x_BND), *y.shape[-2:]))
  if gram_is_cheaper(*x_BND.shape[1:], y.shape[-1]):
    gram_BNM = einsum("bnd,bmd->bnm", x_BND, x_BND).astype(dtype)
    pairs = einsum("bnm,bmk->bnk", gram_BNM, y_BNK)
  else:
    mixed_BKD = einsum("bnk,bnd->bkd", y_BNK, x_BND).astype(dtype)
    pairs = einsum("bnd,bkd->bnk", x_BND, mixed_BKD)
  out = pairs.reshape(len(x_BND), -1)
  out = out - out.mean(1, keepdims=True)
  out = out * jax.lax.rsqrt(jnp.square(out).mean(1, keepdims=True) + eps)
  if scale_F is not None:
    out = out * scale_F.astype(exact)
  if bias_F is not None:
    out = out + bias_F.astype(exact)
  return out.astype(dtype)


def backward(x_BND, y, scale_F, bias_F, gradient_BF, *, eps: float):
  """Gradients of x, y, scale and bias; the forward pass again rather than what it left."""
  _, vjp = jax.vjp(lambda *inputs: forward(*inputs, eps=eps), x_BND, y, scale_F, bias_F)
  return vjp(gradient_BF)
