"""fm_interaction in plain XLA: the cheaper association, products in x's dtype, norm in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gram_is_cheaper(units: int, width: int, rank: int) -> bool:
  """Whether (X Xᵀ) Y takes fewer products than X (Xᵀ Y): N² (D + K) < 2 N D K."""
  return units * (width + rank) < 2 * width * rank


def forward(x_BND, y, scale_F, bias_F, *, eps: float) -> jax.Array:
  """(B, N, D), (N, K) or (B, N, K) -> (B, N * K)."""
  dtype = x_BND.dtype
  exact = jnp.promote_types(dtype, jnp.float32)
  y = y.astype(dtype)
  of_y = "nk" if y.ndim == 2 else "bnk"
  if gram_is_cheaper(*x_BND.shape[1:], y.shape[-1]):
    gram_BNM = jnp.einsum("bnd,bmd->bnm", x_BND, x_BND, preferred_element_type=exact)
    equation = f"bmn,{of_y}->bmk"
    pairs = jnp.einsum(equation, gram_BNM.astype(dtype), y, preferred_element_type=exact)
  else:
    mixed_BKD = jnp.einsum(f"bnd,{of_y}->bkd", x_BND, y, preferred_element_type=exact)
    mixed_BKD = mixed_BKD.astype(dtype)
    pairs = jnp.einsum("bnd,bkd->bnk", x_BND, mixed_BKD, preferred_element_type=exact)
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
