"""Interactions of units: factorisation machines and linear compression (Wukong, section 3).

Letters: B examples, N units in, D width of a unit, K rank, L and F units out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.linear import KERNEL, contract, kernel_init
from gemjax.layers.mlp import Mlp


class UnitLinear(nnx.Module):
  """Linear Compress Block and linear residual: X -> W X, W in R^{L x N}; (B, N, D) -> (B, L, D)."""

  def __init__(self, units: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
    self.kernel_NL = nnx.Param(kernel_init(rngs.params(), (units, outputs)), axes=KERNEL)
    self.units, self.dtype = units, dtype

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return contract("bnd,nl->bld", x_BND, self.kernel_NL[...], self.units, self.dtype)


class FactorizationMachine(nnx.Module):
  """Pairwise dot products of units, flattened.

  basic      X Xᵀ                                         (B, N, D) -> (B, N * N)
  optimised  X (Xᵀ Y), Y in R^{N x K} learnt              (B, N, D) -> (B, N * K), O(N K D)
  attentive  as optimised, Y = reshape(MLP(flatten(C X))) of each example, C in R^{A x N}

  Source: Wukong, section 3.4. The sizes inside the attentive MLP are unpublished; ours are A = K
  compressed units and one hidden layer of 4 K.
  """

  def __init__(self, kind: str, units: int, dim: int, rank: int, *, dtype: str, rngs: nnx.Rngs):
    self.kind, self.units, self.rank, self.dtype = kind, units, rank, dtype
    self.outputs = units * (units if kind == "basic" else rank)
    if kind == "optimised":
      self.y_NK = nnx.Param(kernel_init(rngs.params(), (units, rank)), axes=KERNEL)
    elif kind == "attentive":
      self.compress = UnitLinear(units, rank, dtype=dtype, rngs=rngs)
      self.mlp = Mlp(rank * dim, (4 * rank,), units * rank, dtype=dtype, rngs=rngs)

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    if self.kind == "basic":
      pairs = jnp.einsum("bnd,bmd->bnm", x_BND, x_BND)
    else:
      if self.kind == "optimised":
        mixed_BKD = contract("bnd,nk->bkd", x_BND, self.y_NK[...], self.units, self.dtype)
      else:
        y = self.mlp(rearrange(self.compress(x_BND), "b a d -> b (a d)"), fold(key_B, 0))
        y_BNK = rearrange(y, "b (n k) -> b n k", n=self.units)
        mixed_BKD = jnp.einsum("bnd,bnk->bkd", x_BND, y_BNK)
      pairs = jnp.einsum("bnd,bkd->bnk", x_BND, mixed_BKD)
    return rearrange(pairs, "b n k -> b (n k)")


def pairwise_dots(x_BND: jax.Array) -> jax.Array:
  """(B, N (N - 1) / 2): the dot product of every pair of different units (DLRM)."""
  first, second = jnp.triu_indices(x_BND.shape[1], k=1)
  return jnp.einsum("bnd,bmd->bnm", x_BND, x_BND)[:, first, second]
