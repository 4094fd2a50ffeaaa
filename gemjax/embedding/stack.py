"""A stack of tables: lookup, and an update that reads and writes only the looked-up rows.

Nothing here has a stack's shape but the stack itself: gradients and temporaries follow the M ids
of the batch. An id of R (one beyond the last row) is padding: it reads zeros and updates nothing.

Letters: M ids of a batch (duplicates allowed), R rows, W width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS, RowOptimizer, Slots


class Stack(NamedTuple):
  """The state of one stack.

  Decay shrinks every row at every step but is written only when a row is looked up: a row last
  written when the clock stood at C_s stands for w exp(-rate (C_t - C_s)). `marks_R` keeps C_s;
  `clock` is C_t (its value, and the rounding error of its sum). Both are None without decay.

  decoupled  C_t = sum -log(1 - lr_s decay), rate 1: w <- (1 - lr decay) w at every step
  l2         C_t = sum lr_s, rate = l2 * scale of the row's optimiser (1 / (sqrt(v) + eps)):
             w <- w exp(-lr l2 scale), what the gradient of l2 |w|^2 / 2 does where it is
             preconditioned like the data's but not fed into v. Rare rows, whose v is small, shrink
             most; a row that was never looked up is zero.
  """

  rows_RW: jax.Array
  slots: Slots
  marks_R: jax.Array | None
  clock: jax.Array | None  # (2,) float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StackRule:
  """How stacks are born and updated; static."""

  optimizer: RowOptimizer
  decay: float = 0.0
  l2: float = 0.0
  init_scale: float = 0.01
  dtype: str = "float32"

  @classmethod
  def from_config(cls, config) -> StackRule:
    """The rule of a `gemjax.config.Embedding`."""
    return cls(
      optimizer=ROW_OPTIMIZERS[config.optimizer](config.eps),
      decay=config.weight_decay,
      l2=config.l2,
      init_scale=config.init_scale,
      dtype=config.dtype,
    )

  def init(self, key: jax.Array, rows: int, width: int) -> Stack:
    """Rows from N(0, init_scale^2), slots of zeros."""
    rows_RW = self.init_scale * jax.random.normal(key, (rows, width))
    return Stack(
      rows_RW=rows_RW.astype(self.dtype),
      slots=self.optimizer.init(rows, width),
      marks_R=jnp.zeros((rows,)) if self.shrinks else None,
      clock=jnp.zeros((2,)) if self.shrinks else None,
    )

  def lookup(self, stack: Stack, ids_M: jax.Array) -> jax.Array:
    """(M, W) float32: the rows as a dense optimiser would have them now; zeros for id R."""
    read = lambda array: array.at[ids_M].get(mode="fill", fill_value=0)
    rows_MW = read(stack.rows_RW).astype(jnp.float32)
    if not self.shrinks:
      return rows_MW
    # Slots are read only where the rate depends on them.
    slots = jax.tree.map(read, stack.slots) if self.l2 else {}
    return rows_MW * self._shrunk(slots, stack.clock[0] - read(stack.marks_R))

  def update(
    self,
    stack: Stack,
    ids_M: jax.Array,
    grad_MW: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array | None = None,
  ) -> Stack:
    """One optimiser step on the rows of `ids_M`: duplicates are summed first, other rows keep
    their bits.

    w <- shrunk(w) - delta(g), the shrinking of the steps that the row missed included.

    Args:
      stack: Its buffers are overwritten where the caller donates them.
      ids_M: int32 rows, R for padding.
      grad_MW: Gradient with respect to each looked-up row.
      learning_rate: Scalar of this step.
      key: Randomness of the rounding; needed for bfloat16 rows alone.
    """
    unique_M, sum_MW = sum_duplicates(ids_M, grad_MW, len(stack.rows_RW))
    gather = lambda array: array.at[unique_M].get(
      mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )
    arrays = (stack.rows_RW, stack.slots, stack.marks_R)
    rows_MW, slots, marks_M = jax.tree.map(gather, arrays)
    scatter = lambda array, new: array.at[unique_M].set(
      new.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )
    rows_MW = rows_MW.astype(jnp.float32)
    delta_MW, new_slots = self.optimizer.step(sum_MW, slots, learning_rate)
    clock, new_marks_M = stack.clock, None
    if self.shrinks:
      tick = learning_rate if self.l2 else -jnp.log1p(-learning_rate * self.decay)
      clock = _add(clock, tick)
      rows_MW *= self._shrunk(slots, clock[0] - marks_M)
      # This is C_t, which only grows, for every row with a finite gradient. Written so that marks
      # are seen to be read, by the forward pass behind the gradient and above, before they are
      # written: without an order XLA copies all R of them to keep the old values.
      grown_M = jnp.maximum(clock[0], marks_M)
      new_marks_M = jnp.where(jnp.isfinite(sum_MW[:, 0]), grown_M, marks_M)
    new_MW = rows_MW - delta_MW
    if stack.rows_RW.dtype == jnp.bfloat16:
      new_MW = round_stochastically(new_MW, key)
    rows_RW, slots, marks_R = jax.tree.map(scatter, arrays, (new_MW, new_slots, new_marks_M))
    return Stack(rows_RW, slots, marks_R, clock)

  @property
  def shrinks(self) -> bool:
    return bool(self.decay or self.l2)

  def _shrunk(self, slots: Slots, missed_M: jax.Array) -> jax.Array:
    """The factor that `missed_M` ticks of the clock make of a row."""
    rate = self.l2 * self.optimizer.scale(slots) if self.l2 else 1.0
    return jnp.exp(-rate * missed_M[:, None])


def sum_duplicates(
  ids_M: jax.Array, grad_MW: jax.Array, padding: int
) -> tuple[jax.Array, jax.Array]:
  """Unique ids in ascending order with the sum of their gradients; the tail holds `padding`.

  Sorted first, so that equal ids are summed one after the other, in the order of the batch: no
  contended atomic add on a GPU, and the same bits in every run.
  """
  count = len(ids_M)
  # One 64-bit key of (id, position): XLA sorts plain keys five times as fast as pairs on a CPU.
  with jax.enable_x64(True):
    key_M = (ids_M.astype(jnp.uint64) << 32) | jnp.arange(count, dtype=jnp.uint64)
    key_M = jax.lax.sort(key_M)
    sorted_M, order_M = (key_M >> 32).astype(ids_M.dtype), key_M.astype(jnp.uint32)
  order_M = order_M.astype(jnp.int32)
  first_M = jnp.concatenate([jnp.ones((1,), bool), sorted_M[1:] != sorted_M[:-1]])
  segment_M = jnp.cumsum(first_M.astype(jnp.int32)) - 1
  sum_MW = jax.ops.segment_sum(
    grad_MW.at[order_M].get(mode="promise_in_bounds", unique_indices=True),
    segment_M,
    count,
    indices_are_sorted=True,
    mode="promise_in_bounds",
  )
  unique_M = jnp.full((count,), padding, ids_M.dtype)
  unique_M = unique_M.at[segment_M].set(sorted_M, indices_are_sorted=True)
  return unique_M, sum_MW


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
  """bfloat16 by adding 16 random bits below the kept ones and cutting: E[result] = x.

  Non-finite values pass unchanged.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _add(sum_2: jax.Array, term: jax.Array) -> jax.Array:
  """Compensated sum (Kahan): a clock grows to 100 by ticks of 1e-4 that float32 would round."""
  value, error = sum_2
  corrected = term - error
  total = value + corrected
  return jnp.stack([total, (total - value) - corrected])
