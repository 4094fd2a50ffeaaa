"""The plain deep network: an MLP on the concatenated units ("DNN" in the BARS tables)."""

from __future__ import annotations

import jax
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key
from gemjax.models.heads import Heads


class MlpRanker(nnx.Module):
  """ŷ = MLP(flatten(X0)); (B, N, D) -> (B, T)."""

  def __init__(
    self, config: config_lib.Mlp, *, units: int, dim: int, tasks: int, dtype: str, rngs: nnx.Rngs
  ):
    self.heads = Heads(units * dim, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    return self.heads(rearrange(x_BND, "b n d -> b (n d)"), key_B)
