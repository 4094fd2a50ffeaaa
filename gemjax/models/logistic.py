"""Logistic regression over all features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key


class Logistic(nnx.Module):
  """ŷ_t = sum_n X0[n, t] + b_t: a unit holds one weight a task, so d must equal T.

  Dense features are one such unit, a linear map of them.
  """

  def __init__(
    self,
    config: config_lib.Logistic,
    *,
    units: int,
    dim: int,
    tasks: int,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    del config, units, dtype, rngs
    if dim != tasks:
      raise config_lib.ConfigError(
        f"config.embedding.dim is {dim}, but logistic regression holds one weight a task: {tasks}"
      )
    self.bias_T = nnx.Param(jnp.zeros((tasks,)), axes=("fan_out",))

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    return jnp.sum(x_BND.astype(jnp.float32), axis=1) + self.bias_T[...]
