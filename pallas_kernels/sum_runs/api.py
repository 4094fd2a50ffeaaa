"""Sums over the runs of equal ids, which a sort found.

Letters: N summands, U runs, W width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import rows
from pallas_kernels.dispatch import dispatch
from pallas_kernels.sum_runs import reference, triton, xla

OP = "sum_runs"


def sum_runs(
  x_NW: jax.Array,
  order_N: jax.Array,
  segment_N: jax.Array,
  *,
  count: int,
  implementation: str | None = None,
) -> jax.Array:
  """The sum of every run, in float32 (float64 for float64).

      y[u] = sum of x[order[i]] over segment[i] = u,   0 behind the last run

  In a fixed order, without atomics: the same bits in every run (but not by "xla" on a GPU, which
  adds atomically). The kernel reads every summand and writes every sum once; its temporaries follow
  N W / 64. A run of any length is cut into tiles of 128 that are summed side by side, their sums
  likewise. What is not finite stays in its run. It has no gradient: differentiating it is a
  TypeError.

  Args:
    x_NW: floating.
    order_N: int32, where the i-th smallest id stands in x, as of `sorted_runs`.
    segment_N: int32, the run it belongs to, ascending from 0 without gaps: the kernel writes no sum
      for a number that is left out. What is `count` or more has no sum and is not read.
    count: U.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    y_UW.

  Raises:
    ValueError: Shapes or dtypes that do not fit each other.

  Source: the "duplicates" of FBGEMM's exact optimisers, as an op of its own.
  """
  x_NW, order_N, segment_N = map(jnp.asarray, (x_NW, order_N, segment_N))
  rows.check_rows(OP, "x", x_NW)
  for name, index_N in (("order", order_N), ("segment", segment_N)):
    if index_N.shape != x_NW.shape[:1] or index_N.dtype != jnp.int32:
      raise ValueError(
        f"{OP}: {name} must be int32 of shape {x_NW.shape[:1]}, one for each row of x, "
        f"is {index_N.dtype} of shape {index_N.shape}"
      )
  if count < 0:
    raise ValueError(f"{OP}: count must be 0 or more, is {count}")
  if 0 in (*x_NW.shape, count):
    wide = jnp.promote_types(x_NW.dtype, jnp.float32)
    return jnp.zeros((count, x_NW.shape[1]), wide)
  return _sum_runs(count, implementation, x_NW, order_N, segment_N)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_runs(count: int, implementation: str | None, *arrays):
  modules = {"reference": reference, "xla": xla, "triton": triton}
  bound = {name: functools.partial(m.sum_runs, count=count) for name, m in modules.items()}
  return dispatch(OP, implementation, bound, *arrays, refusal=rows.refusal(arrays[0].dtype))


@_sum_runs.defjvp
def _no_gradient(count, implementation, primals, tangents):
  raise TypeError(f"{OP} has no gradient: it sums gradients, so take them before it")
