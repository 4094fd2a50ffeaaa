"""A stack of which every device holds all rows: no exchange but that of gradients.

Letters: M looked-up rows of this device, U different ones, G devices combined, W width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemjax.embedding.duplicates import Segments, find_duplicates, sum_duplicates
from gemjax.embedding.held import Held
from gemjax.embedding.stack import Stack, StackRule
from gemjax.embedding.travel import moved


class Plan(NamedTuple):
  """What a batch needs of the stack; known from its ids alone."""

  row_M: jax.Array
  own: Segments  # Duplicates among `row_M`.
  merged: Segments | None  # Duplicates among the different rows of all devices combined.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Replicated:
  """Rows are read where they are needed; (row, gradient) pairs of the devices along `axes` are
  gathered, at most min(M, rows + 1) a device, and every device makes the same update.

  Where `axes` is empty this is the whole of embedding on one device.
  """

  held: Held
  axes: tuple[str, ...]

  def plan(self, position_M: jax.Array) -> Plan:
    """From uint64 positions, which are rows."""
    with jax.enable_x64(True):
      row_M = position_M.astype(jnp.int32)
    rows = self.held.rows
    if not self.axes:
      return Plan(row_M, find_duplicates(row_M, rows), None)
    own = find_duplicates(row_M, rows, min(len(row_M), rows + 1))
    row_GU = jax.lax.all_gather(own.unique_U, self.axes, tiled=True)
    return Plan(row_M, own, find_duplicates(row_GU, rows, min(len(row_GU), rows + 1)))

  def lookup(self, rule: StackRule, stack: Stack, plan: Plan) -> jax.Array:
    """(M, W) in the type in which they are read, zeros for padding."""
    return rule.read(stack, plan.row_M)

  def update(
    self, rule: StackRule, stack: Stack, plan: Plan, grad_MW: jax.Array, learning_rate, key
  ) -> Stack:
    """One step with the gradients of all devices combined."""
    own, sum_UW = plan.own, sum_duplicates(plan.own, grad_MW)
    if plan.merged is not None:
      gather = lambda x_UX: jax.lax.all_gather(x_UX, self.axes, tiled=True)
      all_GUW = moved(sum_UW, rule.gradient_dtype, gather)
      own, sum_UW = plan.merged, sum_duplicates(plan.merged, all_GUW)
    return rule.write(stack, own.unique_U, sum_UW, learning_rate, key, self.held)

  def rounds(self, plan: Plan) -> jax.Array:
    """No exchange, no round."""
    del plan
    return jnp.zeros((), jnp.int32)
