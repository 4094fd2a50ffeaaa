"""A stack of which every device of the `model` axis holds some rows: ids go to the owners, rows
come back, gradients go the same way.

One exchange moves at most `capacity` rows between any two devices of a group, whatever the ids, so
that its buffers have a fixed shape. Nothing is dropped: what did not fit goes in further rounds.
All devices, of all groups, agree on the rows of a round: each proposes for every owner the last row
that it can fit, and the smallest proposal is where the round ends. So all gradients of a row meet
in one round and are summed before they are squared, and the result does not depend on the capacity:
to the bit on a CPU, but for the order of a sum on a GPU (duplicates.py).

`ragged_all_to_all` is not used: it crashes on large GPU runs (openxla/xla#47283, #47146).

Gradients of wide rows travel in parts, some columns each: while one is under way the duplicates of
the next are summed here, and those of the one before at the owner.

Letters: M looked-up rows of this device, U different ones (as an array: M), L devices of `model`,
C capacity, D devices of `data` combined, W width, V columns of a part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.config import DATA, MODEL
from gemjax.embedding.duplicates import Segments, find_duplicates, runs, sort_ids, sum_duplicates
from gemjax.embedding.held import Held
from gemjax.embedding.stack import Stack, StackRule
from gemjax.embedding.travel import moved
from pallas_kernels import take_rows
from pallas_kernels.segments import bisect

PART = 32  # Least columns of a part: 64 bytes of bfloat16, two sectors of a GPU's memory.
PARTS = 4  # Most; each further one hides less and costs another start of a collective.


class Round(NamedTuple):
  """What one round moves. The rows of owner l are [begin, end) of this device's different rows."""

  begin_L: jax.Array
  end_L: jax.Array
  wanted_N: jax.Array  # N = L * C, the rows that the group wants of this device.
  merged: Segments  # Duplicates among them, and among those of the groups combined.


class Plan(NamedTuple):
  """What a batch needs of the stack; known from its ids alone."""

  own: Segments  # Duplicates among this device's ids; `unique_U` counts from the owner's first row.
  unique_M: jax.Array  # Which of the different rows each looked-up row is.
  end_L: jax.Array  # Where the different rows of each owner end; padding follows the last.
  first: Round
  rounds_1: jax.Array  # The same number on all devices.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowSharded:
  """`combined`: whether the gradients of the `data` axis are combined."""

  held: Held
  model: int
  capacity: int
  combined: bool

  def plan(self, position_M: jax.Array) -> Plan:
    """From uint64 positions; those of padding are beyond the last owner's."""
    own, unique_M, end_L = self._bucket(position_M)
    first, more = self._round(own, self._begin(end_L), end_L)

    def count(at):
      rounds, begin_L, _ = at
      end, more = self._ends(own, begin_L, end_L)
      return rounds + 1, end, more

    start = (jnp.ones((), jnp.int32), first.end_L, more)
    rounds, _, _ = jax.lax.while_loop(lambda at: at[2], count, start)
    return Plan(own, unique_M, end_L, first, rounds[None])

  def bucket_sizes(self, position_M: jax.Array) -> jax.Array:
    """(L,) int32: different rows that this device wants of every owner."""
    _, _, end_L = self._bucket(position_M)
    return end_L - self._begin(end_L)

  def lookup(self, rule: StackRule, stack: Stack, plan: Plan) -> jax.Array:
    """(M, W) in the type in which they arrive, zeros for padding."""

    def rows_of(round_: Round) -> jax.Array:
      read_NW = rule.read(stack, round_.wanted_N)
      got_NW = moved(read_NW, rule.exchange_dtype, self._exchanged)
      slot_M = self._slots(plan.own.unique_U, round_, plan.end_L)[plan.unique_M]
      return take_rows(got_NW, slot_M)

    def further(k, at):
      begin_L, rows_MW = at
      round_, _ = self._round(plan.own, begin_L, plan.end_L)
      return round_.end_L, rows_MW + rows_of(round_)  # A row comes in one round: exact.

    rows_MW = rows_of(plan.first)
    return jax.lax.fori_loop(1, plan.rounds_1[0], further, (plan.first.end_L, rows_MW))[1]

  def update(
    self, rule: StackRule, stack: Stack, plan: Plan, grad_MW: jax.Array, learning_rate, key
  ) -> Stack:
    """One step with the gradients of all devices combined."""
    parts = jnp.array_split(grad_MW, min(PARTS, max(1, grad_MW.shape[1] // PART)), axis=1)
    sums = _in_turn(functools.partial(sum_duplicates, plan.own), parts)

    def to_owners(sent_NV: jax.Array) -> jax.Array:
      grad_NV = self._exchanged(sent_NV)
      return jax.lax.all_gather(grad_NV, DATA, tiled=True) if self.combined else grad_NV

    def write(stack: Stack, round_: Round, *, tick: bool) -> Stack:
      index_LC = self._window(round_.begin_L)
      index_LC = jnp.where(index_LC < round_.end_L[:, None], index_LC, len(sums[0]))
      sent = [take_rows(sum_UV, index_LC.reshape(-1)) for sum_UV in sums]
      got = [moved(sent_NV, rule.gradient_dtype, to_owners) for sent_NV in sent]
      total_NW = jnp.concatenate(
        _in_turn(functools.partial(sum_duplicates, round_.merged), got), axis=1
      )
      row_N = round_.merged.unique_U
      return rule.write(stack, row_N, total_NW, learning_rate, key, self.held, tick=tick)

    def further(k, at):
      begin_L, stack = at
      round_, _ = self._round(plan.own, begin_L, plan.end_L)
      return round_.end_L, write(stack, round_, tick=False)

    stack = write(stack, plan.first, tick=True)
    return jax.lax.fori_loop(1, plan.rounds_1[0], further, (plan.first.end_L, stack))[1]

  def rounds(self, plan: Plan) -> jax.Array:
    """How many exchanges the batch takes; 1 where the capacity suffices."""
    return plan.rounds_1[0]

  def _exchanged(self, x_NX: jax.Array) -> jax.Array:
    """Row c for owner l comes from there as row c of this device."""
    x_LCX = rearrange(x_NX, "(l c) x -> l c x", l=self.model)
    return rearrange(jax.lax.all_to_all(x_LCX, MODEL, 0, 0), "l c x -> (l c) x")

  def _bucket(self, position_M: jax.Array) -> tuple[Segments, jax.Array, jax.Array]:
    """(own, unique_M, end_L): sorting by position sorts by owner and by row of the owner."""
    count, rows = len(position_M), self.held.rows
    with jax.enable_x64(True):
      sorted_M, order_M = sort_ids(position_M)
      owner_M = (sorted_M // rows).astype(jnp.int32)
      row_M = (sorted_M % rows).astype(jnp.int32)
      segment_M = runs(sorted_M)
    unique_U = jnp.full((count,), rows, jnp.int32)
    unique_U = unique_U.at[segment_M].set(row_M, indices_are_sorted=True)
    unique_M = jnp.zeros((count,), jnp.int32)
    unique_M = unique_M.at[order_M].set(segment_M, unique_indices=True)
    last_L = bisect(owner_M, jnp.arange(self.model), "right")
    number_M = jnp.concatenate([jnp.zeros((1,), jnp.int32), segment_M + 1])
    return Segments(order_M, segment_M, unique_U), unique_M, number_M[last_L]

  def _begin(self, end_L: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), end_L[:-1]])

  def _window(self, begin_L: jax.Array) -> jax.Array:
    return begin_L[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)

  def _ends(self, own: Segments, begin_L, end_L) -> tuple[jax.Array, jax.Array]:
    """(where the round that begins there ends, whether any device has more)."""
    read = lambda index_X: own.unique_U.at[index_X].get(mode="clip")
    fits_L = end_L - begin_L <= self.capacity
    last_L = jnp.where(fits_L, self.held.rows, read(begin_L + self.capacity - 1))
    last_L = jax.lax.pmin(last_L, (DATA, MODEL))
    index_LC = self._window(begin_L)
    taken_LC = (index_LC < end_L[:, None]) & (read(index_LC) <= last_L[:, None])
    new_L = begin_L + taken_LC.sum(1, dtype=jnp.int32)
    return new_L, jax.lax.pmax((new_L < end_L).any(), (DATA, MODEL))

  def _round(self, own: Segments, begin_L, end_L) -> tuple[Round, jax.Array]:
    """(the round that begins there, whether any device has more)."""
    new_L, more = self._ends(own, begin_L, end_L)
    rows = self.held.rows
    index_LC = self._window(begin_L)
    row_LC = own.unique_U.at[index_LC].get(mode="clip")
    asked_LC = jnp.where(index_LC < new_L[:, None], row_LC, rows)
    wanted_N = jax.lax.all_to_all(asked_LC, MODEL, 0, 0).reshape(-1)
    all_N = jax.lax.all_gather(wanted_N, DATA, tiled=True) if self.combined else wanted_N
    merged = find_duplicates(all_N, rows, min(len(all_N), rows + 1))
    return Round(begin_L, new_L, wanted_N, merged), more

  def _slots(self, unique_U: jax.Array, round_: Round, end_L: jax.Array) -> jax.Array:
    """(U,) int32: where each different row lies among the L * C of the round, or L * C."""
    index_U = jnp.arange(len(unique_U), dtype=jnp.int32)
    owner_U = bisect(end_L, index_U, "right")
    inside = lambda bound_L: bound_L.at[owner_U].get(mode="fill", fill_value=0)
    place_U = index_U - inside(round_.begin_L)
    in_round_U = (place_U >= 0) & (index_U < inside(round_.end_L))
    return jnp.where(in_round_U, owner_U * self.capacity + place_U, self.model * self.capacity)


def _in_turn(function: Callable, parts: list[jax.Array]) -> list[jax.Array]:
  """`function` of each part, one after the other: XLA would make one kernel of all, for which all
  parts must be there, and behind which nothing is left to do while they are under way.
  """
  done = []
  for part in parts:
    if done:
      done[-1], part = jax.lax.optimization_barrier((done[-1], part))
    done.append(function(part))
  return done
