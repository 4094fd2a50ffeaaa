"""The formula on the whole table: a dense gradient, then every row that was named."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.rowwise_adagrad.rule import Rule, stored


def update(rule: Rule, table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, words):
  """New table and accumulator, in the accumulator's precision; temporaries as large as both."""
  rows, width = table_RW.shape
  row_N = unique_U.at[segment_N].get(mode="fill", fill_value=rows)
  row_N = jnp.where(row_N < 0, rows, row_N)  # A negative index would count from the end.
  grad_NW = grad_NW[order_N].astype(v_R.dtype)
  grad_RW = jnp.zeros(table_RW.shape, v_R.dtype).at[row_N].add(grad_NW, mode="drop")
  named_R = jnp.zeros((rows,), bool).at[row_N].set(True, mode="drop")
  w_RW, new_v_R = rule.step(table_RW.astype(v_R.dtype), v_R, grad_RW, lr, width)
  w_RW = stored(w_RW, jnp.arange(rows), words, table_RW.dtype)
  return jnp.where(named_R[:, None], w_RW, table_RW), jnp.where(named_R, new_v_R, v_R)
