"""Interactions of units: factorisation machines and linear compression (Wukong, section 3).

Units lie last, so that every map over units is one plain matrix product without a transpose.
Letters: B examples, D width of a unit, N units in, K rank, L units out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.linear import KERNEL, contract, kernel_init
from gemjax.layers.mlp import Mlp

GROUPS = 16  # Of examples, in which gradients of a map over units are summed.


class UnitLinear(nnx.Module):
  """Linear Compress Block and linear residual: X -> W X, W in R^{L x N}; (B, D, N) -> (B, D, L).

  With a bias every output unit has one number more, the same in all of its D places; born at 0.
  """

  def __init__(self, units: int, outputs: int, *, dtype: str, rngs: nnx.Rngs, bias: bool = False):
    self.kernel_NL = nnx.Param(kernel_init(rngs.params(), (units, outputs)), axes=KERNEL)
    self.bias_L = nnx.Param(jnp.zeros((outputs,)), axes=("fan_out",)) if bias else None
    self.units, self.dtype = units, dtype

  @jax.named_scope("unit_linear")
  def __call__(self, x_BDN: jax.Array) -> jax.Array:
    y_BDL = map_units(x_BDN, self.kernel_NL[...], self.units, self.dtype)
    return y_BDL if self.bias_L is None else y_BDL + self.bias_L[...].astype(self.dtype)


class FactorizationMachine(nnx.Module):
  """Pairwise dot products of units, flattened.

  basic      X Xᵀ                                         (B, D, N) -> (B, N * N)
  optimised  X (Xᵀ Y), Y in R^{N x K} learnt              (B, D, N) -> (B, N * K), O(N K D)
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

  @jax.named_scope("fm")
  def __call__(self, x_BDN: jax.Array, key_B: Key = None) -> jax.Array:
    if self.kind == "basic":
      pairs = jnp.einsum("bdn,bdm->bnm", x_BDN, x_BDN)
    else:
      if self.kind == "optimised":
        mixed_BDK = map_units(x_BDN, self.y_NK[...], self.units, self.dtype)
      else:
        y = self.mlp(rearrange(self.compress(x_BDN), "b d a -> b (a d)"), fold(key_B, 0))
        y_BNK = rearrange(y, "b (n k) -> b n k", n=self.units)
        mixed_BDK = jnp.einsum("bdn,bnk->bdk", x_BDN, y_BNK)
      pairs = jnp.einsum("bdn,bdk->bnk", x_BDN, mixed_BDK)
    return rearrange(pairs, "b n k -> b (n k)")


def map_units(x_BDN: jax.Array, kernel_NL: jax.Array, units: int, dtype: str) -> jax.Array:
  """(B, D, L): every example's X W, W whole or this device's rows of it (`contract`)."""
  if kernel_NL.shape[0] != units:
    return contract("bdn,nl->bdl", x_BDN, kernel_NL, units, dtype)
  return _map_whole(x_BDN.astype(dtype), kernel_NL)


# W's gradient is a small matrix, a sum over B D: in groups side by side XLA neither writes X
# transposed nor leaves cores idle.
@jax.custom_vjp
def _map_whole(x_BDN, kernel_NL):
  return jnp.einsum("bdn,nl->bdl", x_BDN, kernel_NL.astype(x_BDN.dtype))


def _forward(x_BDN, kernel_NL):
  return _map_whole(x_BDN, kernel_NL), (x_BDN, kernel_NL)


def _backward(kept, gradient_BDL):
  x_BDN, kernel_NL = kept
  of_x_BDN = jnp.einsum("bdl,nl->bdn", gradient_BDL, kernel_NL.astype(x_BDN.dtype))
  groups = math.gcd(len(x_BDN), GROUPS)
  x_GRN, gradient_GRL = (
    rearrange(a, "(g b) d n -> g (b d) n", g=groups) for a in (x_BDN, gradient_BDL)
  )
  of_kernel_GNL = jnp.einsum(
    "grn,grl->gnl", x_GRN, gradient_GRL, preferred_element_type=kernel_NL.dtype
  )
  return of_x_BDN, of_kernel_GNL.sum(0)


_map_whole.defvjp(_forward, _backward)


def pairwise_dots(x_BND: jax.Array) -> jax.Array:
  """(B, N (N - 1) / 2): the dot product of every pair of different units (DLRM)."""
  first, second = jnp.triu_indices(x_BND.shape[1], k=1)
  return jnp.einsum("bnd,bmd->bnm", x_BND, x_BND)[:, first, second]
