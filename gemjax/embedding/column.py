"""A stack of which every device of the `model` axis holds some columns of all rows.

Ids are gathered inside `model`; every device looks all of them up in its columns and sends each
device the columns that its examples need. Nothing depends on which rows are popular.

Letters: M looked-up rows of this device, L devices of `model`, D of `data` combined, W the whole
width, V = W / L the columns of a device.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.config import DATA, MODEL
from gemjax.embedding.duplicates import Segments, find_duplicates, sum_duplicates
from gemjax.embedding.held import Held
from gemjax.embedding.stack import Stack, StackRule
from gemjax.embedding.travel import moved


class Plan(NamedTuple):
  """What a batch needs of the stack; known from its ids alone."""

  row_N: jax.Array  # N = L * M, the rows of the whole `model` group.
  merged: Segments  # Duplicates among them, and among those of the groups combined.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ColumnSharded:
  """`combined`: whether the gradients of the `data` axis are combined."""

  held: Held
  model: int
  combined: bool

  def plan(self, position_M: jax.Array) -> Plan:
    """From uint64 positions, which are rows."""
    with jax.enable_x64(True):
      row_M = position_M.astype(jnp.int32)
    row_N = jax.lax.all_gather(row_M, MODEL, tiled=True)
    all_N = jax.lax.all_gather(row_N, DATA, tiled=True) if self.combined else row_N
    rows = self.held.rows
    return Plan(row_N, find_duplicates(all_N, rows, min(len(all_N), rows + 1)))

  def lookup(self, rule: StackRule, stack: Stack, plan: Plan) -> jax.Array:
    """(M, W) in the type in which they arrive, zeros for padding."""
    # From all examples and these columns to these examples and all columns.
    mine_NV = moved(rule.read(stack, plan.row_N), rule.exchange_dtype, self._exchanged)
    return rearrange(mine_NV, "(l m) v -> m (l v)", l=self.model)

  def update(
    self, rule: StackRule, stack: Stack, plan: Plan, grad_MW: jax.Array, learning_rate, key
  ) -> Stack:
    """One step with the gradients of all devices combined."""

    def to_owners(x_NX: jax.Array) -> jax.Array:
      x_NX = self._exchanged(x_NX)
      return jax.lax.all_gather(x_NX, DATA, tiled=True) if self.combined else x_NX

    mine_NV = rearrange(grad_MW, "m (l v) -> (l m) v", l=self.model)
    grad_NV = moved(mine_NV, rule.gradient_dtype, to_owners)
    sum_UV = sum_duplicates(plan.merged, grad_NV)
    return rule.write(stack, plan.merged.unique_U, sum_UV, learning_rate, key, self.held)

  def _exchanged(self, x_NX: jax.Array) -> jax.Array:
    x_LMX = rearrange(x_NX, "(l m) x -> l m x", l=self.model)
    return rearrange(jax.lax.all_to_all(x_LMX, MODEL, 0, 0), "l m x -> (l m) x")

  def rounds(self, plan: Plan) -> jax.Array:
    """One exchange, always."""
    del plan
    return jnp.ones((), jnp.int32)
