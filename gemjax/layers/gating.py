"""The gate of InterFormer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.mlp import Mlp

ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "identity": lambda x: x}


class Gating(nnx.Module):
  """x_BMD -> act(X * MLP(X)), act sigmoid, tanh or identity; the product lies inside it. Where
  `kind` is "none", x_BMD as it is.

  Every unit alone. Source: InterFormer (arXiv 2411.09852); one hidden layer of D is ours.
  """

  def __init__(self, kind: str, dim: int, *, dtype: str, rngs: nnx.Rngs):
    make = lambda: Mlp(dim, (dim,), dim, dtype=dtype, rngs=rngs)
    self.mlp = None if kind == "none" else make()
    self.kind = kind

  def __call__(self, x_BMD: jax.Array) -> jax.Array:
    if self.mlp is None:
      return x_BMD
    gate = self.mlp(rearrange(x_BMD, "b m d -> (b m) d"))
    gate_BMD = rearrange(gate, "(b m) d -> b m d", b=len(x_BMD))
    return ACTIVATIONS[self.kind](x_BMD * gate_BMD)
