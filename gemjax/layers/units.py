"""The input of every model: all features as units of width D."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.dropout import Key, unit_dropout
from gemjax.layers.mlp import Mlp


class UnitInput(nnx.Module):
  """X0 = [dense units | embedding units | units of grouped small tables], (B, N, D).

  Dense features pass an MLP into `dense_units` units. Small tables, `group` at a time, are
  concatenated and mapped by an MLP to as many units as the group's values fill, at least one.

  Source: Wukong, section 3.2; the widths of the small groups' MLP are ours.
  """

  def __init__(
    self,
    *,
    dim: int,
    units: int,
    dense: int,
    dense_mlp: tuple[int, ...],
    dense_units: int,
    dense_relu: bool,
    small: int,
    small_dim: int,
    small_group: int,
    feature_dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.dim, self.dtype, self.feature_dropout = dim, dtype, feature_dropout
    self.dense_relu = dense_relu
    make = lambda inputs, hidden, out: Mlp(inputs, hidden, out * dim, dtype=dtype, rngs=rngs)
    self.units = units + (dense_units if dense else 0)
    self.dense = make(dense, dense_mlp, dense_units) if dense else None
    self.groups = [(i, min(i + small_group, small)) for i in range(0, small, small_group)]
    mlps = []
    for start, end in self.groups:
      inputs = (end - start) * small_dim
      out = max(1, inputs // dim)
      mlps.append(make(inputs, (4 * out * dim,), out))
      self.units += out
    self.small = nnx.List(mlps)

  @jax.named_scope("inputs")
  def __call__(
    self, units_BND: jax.Array, small_BSW: jax.Array, dense_BF: jax.Array, key_B: Key = None
  ) -> jax.Array:
    parts = [units_BND.astype(self.dtype)]
    if self.dense is not None:
      dense = self.dense(dense_BF.astype(self.dtype))
      dense = jax.nn.relu(dense) if self.dense_relu else dense
      parts.insert(0, rearrange(dense, "b (n d) -> b n d", d=self.dim))
    for (start, end), mlp in zip(self.groups, self.small):
      group = rearrange(small_BSW[:, start:end].astype(self.dtype), "b s w -> b (s w)")
      parts.append(rearrange(mlp(group), "b (n d) -> b n d", d=self.dim))
    return unit_dropout(jnp.concatenate(parts, 1), self.feature_dropout, key_B)
