"""DLRM (Naumov et al. 2019, arXiv 1906.00091)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key
from gemjax.layers.interaction import pairwise_dots
from gemjax.models.heads import Heads


class Dlrm(nnx.Module):
  """ŷ = MLP([flatten(X0) | x_n · x_m for n < m]).

  The paper passes on only the dense unit; with categorical features alone (Frappe) there is none,
  so all units pass, as in the BARS implementation.
  """

  def __init__(
    self, config: config_lib.Dlrm, *, units: int, dim: int, tasks: int, dtype: str, rngs: nnx.Rngs
  ):
    inputs = units * dim + units * (units - 1) // 2
    self.heads = Heads(inputs, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    flat = rearrange(x_BND, "b n d -> b (n d)")
    return self.heads(jnp.concatenate([flat, pairwise_dots(x_BND)], 1), key_B)
