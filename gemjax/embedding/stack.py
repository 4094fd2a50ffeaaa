"""A stack of tables: reading rows, and an update that reads and writes only the looked-up rows.

What a device holds of it: all rows, its share of the rows, or its share of the columns. Nothing
here has a stack's shape but the stack itself: gradients and temporaries follow the ids of the
batch. A row R (one beyond the last) is padding: it reads zeros and updates nothing.

Letters: M rows asked for, U different ones, R rows held, W columns held.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemjax.config import MODEL
from gemjax.embedding.held import Held, own_columns, row_keys
from gemjax.embedding.rounding import FLOAT8, quantize, row_scales, to_bfloat16
from gemjax.embedding.row_optimizers import RowOptimizer, Slots
from pallas_kernels import take_rows

# Rows born or averaged at a time: temporaries of 2^16 rows, whatever the table.
CHUNK = 2**16


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
  scales_R: jax.Array | None = None  # Of rows in float8; see gemjax/embedding/rounding.py.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StackRule:
  """How stacks are born and updated; static."""

  optimizer: RowOptimizer
  decay: float = 0.0
  l2: float = 0.0
  init_scale: float = 0.01
  dtype: str = "float32"
  exchange_dtype: str = "float32"  # Of rows on their way to those who look them up.
  gradient_dtype: str = "float32"  # On their way to the owners, where they are summed in float32.

  @classmethod
  def from_config(cls, config, optimizer: RowOptimizer) -> StackRule:
    """The rule of a `gemjax.config.Embedding`."""
    return cls(
      optimizer=optimizer,
      decay=config.weight_decay,
      l2=config.l2,
      init_scale=config.init_scale,
      dtype=config.dtype,
      exchange_dtype=config.exchange_dtype,
      gradient_dtype=config.gradient_dtype,
    )

  def init(self, key: jax.Array, held: Held) -> Stack:
    """Rows from N(0, init_scale^2), each from its own number, so that every mesh draws the same;
    slots of zeros. No temporary is larger than a chunk of rows.
    """
    chunk = min(CHUNK, held.rows)

    def fill(i, stored):
      start = jnp.minimum(i * chunk, held.rows - chunk)
      new_CW = self.born(key, held, start + jnp.arange(chunk))
      new = self._stored(new_CW, None, held)
      put = lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)
      return jax.tree.map(put, stored, new)

    empty = jnp.zeros((held.rows, held.width), self.dtype)
    stored = (empty, jnp.zeros((held.rows,)) if self.scaled else None)
    rows_RW, scales_R = jax.lax.fori_loop(0, -(-held.rows // chunk), fill, stored)
    return Stack(
      rows_RW=rows_RW,
      slots=self.optimizer.init(held.rows, held.width),
      marks_R=jnp.zeros((held.rows,)) if self.shrinks else None,
      clock=jnp.zeros((2,)) if self.shrinks else None,
      scales_R=scales_R,
    )

  def born(self, key: jax.Array, held: Held, row_N: jax.Array) -> jax.Array:
    """(N, W) float32: the rows that `init` gives."""
    keys = row_keys(key, held, row_N)
    new_NW = jax.vmap(lambda k: jax.random.normal(k, (held.all_columns,)))(keys)
    return self.init_scale * own_columns(new_NW, held)

  def read(self, stack: Stack, row_M: jax.Array) -> jax.Array:
    """(M, W): the rows as a dense optimiser would have them now; zeros for row R.

    In the stack's type where they are as stored, float32 where they had to be scaled or shrunk.
    """
    read = lambda array: array.at[row_M].get(mode="fill", fill_value=0)
    if self.scaled:
      rows_MW = self._widened(read(_words(stack.rows_RW)), read(stack.scales_R))
    else:
      rows_MW = take_rows(stack.rows_RW, row_M)
    if not self.shrinks:
      return rows_MW
    # Slots are read only where the rate depends on them.
    slots = jax.tree.map(read, stack.slots) if self.l2 else {}
    return rows_MW * self._shrunk(slots, stack.clock[0] - read(stack.marks_R))

  def write(
    self,
    stack: Stack,
    row_U: jax.Array,
    grad_UW: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array,
    held: Held,
    *,
    tick: bool = True,
  ) -> Stack:
    """One optimiser step on different rows in ascending order; other rows keep their bits.

    w <- shrunk(w) - delta(g), the shrinking of the steps that the row missed included.

    Args:
      stack: Its buffers are overwritten where the caller donates them.
      row_U: int32 rows, R for padding, which stands last.
      grad_UW: The row's gradient, duplicates summed.
      learning_rate: Scalar of this step.
      key: Randomness of the rounding of narrow rows, of this step and stack.
      held: What of the stack this device holds.
      tick: Whether the clock moves: once a step, although a step may write in several rounds.
    """
    gather = lambda array: array.at[row_U].get(
      mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )
    arrays = (_words(stack.rows_RW), stack.scales_R, stack.slots, stack.marks_R)
    # All reads, of the forward pass behind the gradient too, before the first write: without an
    # order XLA copies whole arrays to keep their old values. (XLA for GPUs keeps the barrier; that
    # for CPUs drops it and sees the order only where what is written comes from the gradient.)
    gathered = jax.tree.map(gather, arrays)
    gathered, grad_UW = jax.lax.optimization_barrier((gathered, grad_UW))
    rows_UW, scales_U, slots, marks_U = gathered
    scatter = lambda array, new: array.at[row_U].set(
      new.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )
    rows_UW = self._widened(rows_UW, scales_U)
    delta_UW, new_slots = self.optimizer.step(grad_UW, slots, learning_rate)
    clock, new_marks_U = stack.clock, None
    if self.shrinks:
      clock = self._ticked(clock, learning_rate) if tick else clock
      rows_UW *= self._shrunk(slots, clock[0] - marks_U)
      # This is C_t, which only grows, for every row with a finite gradient; so that it comes from
      # what was read.
      grown_U = jnp.maximum(clock[0], marks_U)
      new_marks_U = jnp.where(jnp.isfinite(grad_UW[:, 0]), grown_U, marks_U)
    noise_UW = self._noise(key, held, row_U)
    new_UW, new_scales_U = self._stored(rows_UW - delta_UW, noise_UW, held)
    new = (_words(new_UW), new_scales_U, new_slots, new_marks_U)
    rows_RW, scales_R, slots, marks_R = jax.tree.map(scatter, arrays, new)
    if self.dtype == "float32" and not self.shrinks:
      # The same sums, of which XLA for CPUs reads no row first into an array (WORKSPACE.md).
      add = lambda rows_RW, delta_UW, _: rows_RW.at[row_U].add(
        -delta_UW, mode="drop", unique_indices=True, indices_are_sorted=True
      )
      written = lambda *arrays: arrays[2]
      rows_RW = jax.lax.platform_dependent(
        stack.rows_RW, delta_UW, rows_RW, cpu=add, default=written
      )
    return Stack(self._of_words(rows_RW), slots, marks_R, clock, scales_R)

  def average(self, stack: Stack, axis: str, key: jax.Array, held: Held) -> Stack:
    """Rows and slots become the mean over the devices of `axis`, the shrinking that is due applied
    first; a chunk of rows at a time, in place.
    """
    chunk = min(CHUNK, held.rows)

    def mean(i, stack):
      start = jnp.minimum(i * chunk, held.rows - chunk)
      # The last chunk reaches back into the one before it: a mean of equal rows is the row, but for
      # a last bit where their number is no power of two.
      arrays = (stack.rows_RW, stack.scales_R, stack.slots, stack.marks_R)
      cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, chunk)
      rows_CW, scales_C, slots, marks_C = jax.tree.map(cut, arrays)
      new_CW = self._widened(_words(rows_CW), scales_C)
      if self.shrinks:
        new_CW *= self._shrunk(slots, stack.clock[0] - marks_C)
        marks_C = jnp.full_like(marks_C, stack.clock[0])
      new_CW, slots = jax.lax.pmean((new_CW, slots), axis)
      noise_CW = self._noise(key, held, start + jnp.arange(chunk))
      new = (*self._stored(new_CW, noise_CW, held), slots, marks_C)
      put = lambda array, new: jax.lax.dynamic_update_slice_in_dim(
        array, new.astype(array.dtype), start, 0
      )
      rows_RW, scales_R, slots, marks_R = jax.tree.map(put, arrays, new)
      return Stack(rows_RW, slots, marks_R, stack.clock, scales_R)

    return jax.lax.fori_loop(0, -(-held.rows // chunk), mean, stack)

  @property
  def scaled(self) -> bool:
    """Whether a row has a scale of its own."""
    return self.dtype == FLOAT8

  def _noise(self, key: jax.Array, held: Held, row_U: jax.Array) -> jax.Array | None:
    """Random bits of every weight: of its row's number, the same on every mesh."""
    if self.dtype == "float32":
      return None
    word = jnp.uint32 if self.scaled else jnp.uint16
    keys = row_keys(key, held, row_U)
    noise_UW = jax.vmap(lambda k: jax.random.bits(k, (held.all_columns,), word))(keys)
    return own_columns(noise_UW, held)

  def _stored(
    self, x_UW: jax.Array, noise_UW: jax.Array | None, held: Held
  ) -> tuple[jax.Array, jax.Array | None]:
    """(rows in the stack's type, their scales); to the nearest without noise."""
    if self.scaled:
      axis = MODEL if held.width < held.all_columns else None  # The scale is the whole row's.
      scales_U = row_scales(x_UW, axis)
      return quantize(x_UW, scales_U, noise_UW), scales_U
    if noise_UW is None:
      return x_UW.astype(self.dtype), None
    return to_bfloat16(x_UW, noise_UW), None

  def _widened(self, words_UW: jax.Array, scales_U: jax.Array | None) -> jax.Array:
    """float32 of stored rows."""
    rows_UW = self._of_words(words_UW).astype(jnp.float32)
    return rows_UW * scales_U[:, None] if self.scaled else rows_UW

  def _of_words(self, words_RW: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words_RW, self.dtype) if self.scaled else words_RW

  def _ticked(self, clock: jax.Array, learning_rate: jax.Array) -> jax.Array:
    return _add(clock, learning_rate if self.l2 else -jnp.log1p(-learning_rate * self.decay))

  @property
  def shrinks(self) -> bool:
    return bool(self.decay or self.l2)

  def _shrunk(self, slots: Slots, missed_M: jax.Array) -> jax.Array:
    """The factor that `missed_M` ticks of the clock make of a row."""
    rate = self.l2 * self.optimizer.scale(slots) if self.l2 else 1.0
    return jnp.exp(-rate * missed_M[:, None])


def _words(rows_RW: jax.Array) -> jax.Array:
  """Rows in float8 as bytes, the same memory: XLA has gathers and scatters of bytes everywhere."""
  scaled = rows_RW.dtype.name == FLOAT8
  return jax.lax.bitcast_convert_type(rows_RW, jnp.uint8) if scaled else rows_RW


def _add(sum_2: jax.Array, term: jax.Array) -> jax.Array:
  """Compensated sum (Kahan): a clock grows to 100 by ticks of 1e-4 that float32 would round."""
  value, error = sum_2
  corrected = term - error
  total = value + corrected
  return jnp.stack([total, (total - value) - corrected])
