"""Factorisation machine (Rendle 2010)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key


class Fm(nnx.Module):
  """ŷ_t = b_t + sum_n w_nt + a_t sum_{n < m} <v_n, v_m>; a unit is [w_1 .. w_T | v].

  The pairwise sum is (|sum_n v_n|^2 - sum_n |v_n|^2) / 2, O(N D). `a_t`, born at one, lets tasks
  share the factors.
  """

  def __init__(
    self, config: config_lib.Fm, *, units: int, dim: int, tasks: int, dtype: str, rngs: nnx.Rngs
  ):
    del config, units, dtype, rngs
    if dim <= tasks:
      raise config_lib.ConfigError(
        f"config.embedding.dim is {dim}, but an FM needs the tasks' {tasks} linear weights and "
        "at least one factor"
      )
    self.tasks = tasks
    self.bias_T = nnx.Param(jnp.zeros((tasks,)), axes=("fan_out",))
    self.scale_T = nnx.Param(jnp.ones((tasks,)), axes=("fan_out",))

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    x_BND = x_BND.astype(jnp.float32)
    linear_BT = jnp.sum(x_BND[..., : self.tasks], axis=1)
    v_BND = x_BND[..., self.tasks :]
    pairs_BD = jnp.square(v_BND.sum(1)) - jnp.square(v_BND).sum(1)
    return self.bias_T[...] + linear_BT + 0.5 * pairs_BD.sum(1)[:, None] * self.scale_T[...]
