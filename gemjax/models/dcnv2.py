"""DCN-V2 (Wang et al. 2021, arXiv 2008.13535), the parallel structure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key, dropout, fold
from gemjax.layers.linear import Linear
from gemjax.layers.mlp import Mlp
from gemjax.models.heads import Heads


class Dcnv2(nnx.Module):
  """x_{i+1} = x_0 * (W_i x_i + b_i) + x_i, beside an MLP of x_0; ŷ is linear in both."""

  def __init__(
    self, config: config_lib.Dcnv2, *, units: int, dim: int, tasks: int, dtype: str, rngs: nnx.Rngs
  ):
    width = units * dim
    self.dropout = config.dropout
    self.cross = nnx.List(
      [Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(config.layers)]
    )
    *hidden, last = config.mlp
    self.deep = Mlp(width, tuple(hidden), last, dtype=dtype, rngs=rngs, dropout=config.dropout)
    self.heads = Heads(width + last, (), tasks, 0.0, dtype, rngs)

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    x0 = rearrange(x_BND, "b n d -> b (n d)")
    x = x0
    for layer in self.cross:
      x = x0 * layer(x) + x
    deep = jax.nn.relu(self.deep(x0, fold(key_B, 0)))
    deep = dropout(deep, self.dropout, fold(key_B, 1))
    return self.heads(jnp.concatenate([x, deep], 1))
