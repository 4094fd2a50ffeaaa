"""MaskNet: several embeddings of an event become one token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.linear import Linear
from gemjax.layers.mlp import Mlp


class MaskNet(nnx.Module):
  """x_EI -> MLP_lce(S * MLP_mask(S)), (E, I = sequences * D) -> (E, D), every event alone.

  Source: InterFormer (arXiv 2411.09852). The sizes are ours: MLP_mask has one hidden layer of I,
  MLP_lce is linear, as Wukong's linear compression is; the mask is born at one, so that events
  whose rows are small pass from the start.
  """

  def __init__(self, sequences: int, dim: int, *, dtype: str, rngs: nnx.Rngs):
    inputs = sequences * dim
    self.mask = Mlp(inputs, (inputs,), inputs, dtype=dtype, rngs=rngs)
    self.mask.layers[-1].bias[...] = jnp.ones(inputs)
    self.lce = Linear(inputs, dim, dtype=dtype, rngs=rngs)

  def __call__(self, x_EI: jax.Array) -> jax.Array:
    return self.lce(x_EI * self.mask(x_EI))
