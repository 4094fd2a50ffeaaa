"""Segments pooled: sum, mean, maximum, or the last rows.

Letters: S segments, T rows, W width, K last rows.
"""

from __future__ import annotations

import functools
from numbers import Integral

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, rows, segments
from pallas_kernels.jagged_pool import reference, triton, xla

_OP = "jagged_pool"
MODES = ("sum", "mean", "max", "last")


def jagged_pool(
  x_TW: jax.Array,
  offsets_S1: jax.Array,
  *,
  mode: str,
  k: int | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Every segment pooled.

      "sum"   y[s] = sum of x[t] over offsets[s] <= t < offsets[s + 1]
      "mean"  y[s] = the sum over the number of rows
      "max"   y[s, w] = the largest x[t, w]
      "last"  y[s, j] = x[offsets[s + 1] - k + j], the newest last;
                        0 in front where the segment has fewer than k rows

  An empty segment gives 0 in every mode (as `torch.nn.EmbeddingBag` does, also for "max"). Sums are
  taken in float32 (float64 for float64). A tie of "max" goes to the first row, which alone gets the
  gradient; NaN counts as larger than any number, as in `jnp.max`.

  Args:
    x_TW: float. Rows outside the segments are not read; their gradient is 0.
    offsets_S1: int32, of segments as in `segments`.
    mode: One of `MODES`.
    k: The number of rows that "last" keeps of each segment, at least 1; only for "last".
    implementation: As in `dispatch`.

  Returns:
    y_SW of x's dtype; y_SKW for "last".

  Raises:
    ValueError: Wrong dtypes or ranks, an unknown mode or implementation, `k` where it has no
      meaning or none where it has.

  Source: "last" is S_recentK of InterFormer (arXiv:2411.09852) and of HSTU's newest events.
  """
  dispatch.check(_OP, implementation)
  x_TW, offsets_S1 = jnp.asarray(x_TW), segments.as_offsets(_OP, "offsets", offsets_S1)
  rows.check_rows(_OP, "x", x_TW, moved=mode == "last")
  if mode not in MODES:
    raise ValueError(f"{_OP}: mode must be one of {', '.join(MODES)}, is {mode!r}")
  known = k is not None
  if (mode == "last") != known or (known and not (isinstance(k, Integral) and k >= 1)):
    raise ValueError(f"{_OP}: 'last', and it alone, takes k of 1 or more; mode {mode!r} got k={k}")
  if 0 in (*x_TW.shape, len(offsets_S1) - 1):
    # Nothing to pool, and no row to differentiate by.
    shape = (len(offsets_S1) - 1, *(() if k is None else (k,)), x_TW.shape[1])
    return jnp.zeros(shape, x_TW.dtype)
  if implementation == "reference":
    return reference.jagged_pool(x_TW, offsets_S1, mode, k)
  pool = {"sum": _sum, "mean": _sum, "max": _max, "last": _last}[mode]
  return pool(x_TW, offsets_S1, mode if k is None else k, len(x_TW), implementation)


def _dispatch(name, implementation, dtype, *args):
  return dispatch.dispatch(
    _OP,
    implementation,
    {"xla": getattr(xla, name), "triton": functools.partial(getattr(triton, name), op=_OP)},
    *args,
    refusal=rows.refusal(dtype),
  )


def _share(offsets_S1: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """share_S, float32 or wider: what one row is of its segment's mean."""
  length_S = jnp.maximum(segments.lengths(offsets_S1), 1)
  return 1 / length_S.astype(jnp.promote_types(dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _sum(x_TW, offsets_S1, mode, rows_in, implementation):
  del rows_in
  scale_S = _share(offsets_S1, x_TW.dtype) if mode == "mean" else None
  return _dispatch("segment_sum", implementation, x_TW.dtype, x_TW, offsets_S1, scale_S)


def _sum_forward(x_TW, offsets_S1, *static):
  return _sum(x_TW, offsets_S1, *static), offsets_S1


def _sum_backward(mode, rows_in, implementation, offsets_S1, dy_SW):
  segment_T, inside_T = rows.members(offsets_S1, rows_in)
  dx_TW = rows.gather(
    [(dy_SW, jnp.where(inside_T, segment_T, -1))],
    _share(offsets_S1, dy_SW.dtype)[segment_T] if mode == "mean" else None,
    op=_OP,
    direction="backward",
    implementation=implementation,
  )
  return dx_TW, None


_sum.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _max(x_TW, offsets_S1, mode, rows_in, implementation):
  return _max_forward(x_TW, offsets_S1, mode, rows_in, implementation)[0]


def _max_forward(x_TW, offsets_S1, mode, rows_in, implementation):
  del mode, rows_in
  y_SW, row_SW = _dispatch("segment_max", implementation, x_TW.dtype, x_TW, offsets_S1)
  return y_SW, (offsets_S1, row_SW)


def _max_backward(mode, rows_in, implementation, residuals, dy_SW):
  del mode
  offsets_S1, row_SW = residuals
  segment_T, inside_T = rows.members(offsets_S1, rows_in)
  segment_T = jnp.where(inside_T, segment_T, -1)
  return _dispatch("max_gradient", implementation, dy_SW.dtype, dy_SW, row_SW, segment_T), None


_max.defvjp(_max_forward, _max_backward)


def _last_rows(offsets_S1: jax.Array, k: int) -> jax.Array:
  """row_M of the last k rows of every segment; -1 in front of a segment's first."""
  row_SK = offsets_S1[1:, None] - k + jnp.arange(k, dtype=jnp.int32)
  return jnp.where(row_SK >= offsets_S1[:-1, None], row_SK, -1).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _last(x_TW, offsets_S1, k, rows_in, implementation):
  del rows_in
  index_M = _last_rows(offsets_S1, k)
  y_MW = rows.gather(
    [(x_TW, index_M)], op=_OP, direction="last_forward", implementation=implementation
  )
  return y_MW.reshape(-1, k, x_TW.shape[1])


def _last_forward(x_TW, offsets_S1, *static):
  return _last(x_TW, offsets_S1, *static), offsets_S1


def _last_backward(k, rows_in, implementation, offsets_S1, dy_SKW):
  segment_T, inside_T = rows.members(offsets_S1, rows_in)
  place_T = jnp.arange(rows_in, dtype=jnp.int32) - (offsets_S1[segment_T + 1] - k)
  index_T = jnp.where(inside_T & (place_T >= 0), segment_T * k + place_T, -1)
  dy_MW, row_M = dy_SKW.reshape(-1, dy_SKW.shape[-1]), _last_rows(offsets_S1, k)
  args = (dy_MW, row_M, index_T)
  return _dispatch("last_gradient", implementation, dy_MW.dtype, *args), None


_last.defvjp(_last_forward, _last_backward)
