"""Row-wise AdaGrad in plain JAX, whose work follows the gradients and not the table.

On a GPU its sum of duplicates is XLA's scatter-add, with atomics: not the same bits in every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rowwise_adagrad.rule import Rule, stored


def update(rule: Rule, table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, words):
  """New table and accumulator: sums of the runs, their rows read, stepped and written."""
  rows, width = table_RW.shape
  sorted_NW = grad_NW.at[order_N].get(mode="promise_in_bounds", unique_indices=True)
  grad_UW = jax.ops.segment_sum(
    sorted_NW.astype(v_R.dtype), segment_N, len(unique_U), indices_are_sorted=True
  )
  row_U = jnp.where(unique_U < 0, rows, unique_U)  # A negative index would count from the end.
  # A run that no gradient belongs to has a row, maybe, but no step.
  named_U = jnp.zeros((len(unique_U),), bool).at[segment_N].set(True, indices_are_sorted=True)
  row_U = jnp.where(named_U, row_U, rows)
  read = lambda array: array.at[row_U].get(mode="fill", fill_value=0)
  write = lambda array, new: array.at[row_U].set(new, mode="drop", unique_indices=True)
  # All reads before the first write: without an order XLA may copy the table to keep its old rows.
  w_UW, v_U, grad_UW = jax.lax.optimization_barrier((read(table_RW), read(v_R), grad_UW))
  w_UW, v_U = rule.step(w_UW.astype(v_R.dtype), v_U, grad_UW, lr, width)
  return write(table_RW, stored(w_UW, row_U, words, table_RW.dtype)), write(v_R, v_U)
