"""Jagged arrays side by side.

Letters: K arrays, S segments, T rows, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, rows, segments
from pallas_kernels.jagged_concat import reference

_OP = "jagged_concat"


def jagged_concat(
  xs: Sequence[jax.Array],
  offsets: Sequence[jax.Array],
  *,
  rows_out: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One jagged array whose segment s is the segments s of all arrays, one behind the other.

      offsets_out[s] = sum over k of (offsets_k[s] - offsets_k[0])
      y[offsets_out[s] + sum over j < k of length_j[s] + i] = x_k[offsets_k[s] + i]
      y[t] = 0 from offsets_out[-1] on

  Args:
    xs: K >= 1 arrays x_TW, each with its own T, of one float dtype and one width. Rows outside the
      segments are not read; their gradient is 0.
    offsets: K arrays offsets_S1, int32, all of the same S.
    rows_out: The static room of the result; by default the sum of all T, which always suffices.
      Rows beyond it are cut off the end, offsets too, so that the result stays a valid jagged
      array; a caller who gives less room sees to it that the events fit.
    implementation: As in `dispatch`.

  Returns:
    y_TW (T = rows_out) and offsets_S1, from 0 on.

  Raises:
    ValueError: No array, another number of offsets, other dtypes, widths or numbers of segments,
      negative room, an unknown implementation.
  """
  dispatch.check(_OP, implementation)
  xs = tuple(map(jnp.asarray, xs))
  offsets = tuple(segments.as_offsets(_OP, f"offsets[{k}]", x) for k, x in enumerate(offsets))
  if not xs or len(xs) != len(offsets):
    raise ValueError(
      f"{_OP}: {len(xs)} arrays need as many offsets and at least one, got {len(offsets)}"
    )
  for k, (x_TW, offsets_S1) in enumerate(zip(xs, offsets)):
    rows.check_rows(_OP, f"xs[{k}]", x_TW, moved=True)
    if (x_TW.shape[1], x_TW.dtype) != (xs[0].shape[1], xs[0].dtype):
      raise ValueError(
        f"{_OP}: xs[{k}] is {x_TW.dtype} of width {x_TW.shape[1]}, "
        f"xs[0] is {xs[0].dtype} of width {xs[0].shape[1]}"
      )
    if len(offsets_S1) != len(offsets[0]):
      raise ValueError(
        f"{_OP}: offsets[{k}] have {len(offsets_S1) - 1} segments, "
        f"offsets[0] have {len(offsets[0]) - 1}"
      )
  rows_out = sum(len(x_TW) for x_TW in xs) if rows_out is None else rows_out
  if not isinstance(rows_out, Integral) or rows_out < 0:
    raise ValueError(f"{_OP}: rows_out must be a whole number of 0 or more, is {rows_out}")
  if implementation == "reference":
    return reference.jagged_concat(xs, offsets, rows_out)
  if len(offsets[0]) == 1:
    return jnp.zeros((rows_out, xs[0].shape[1]), xs[0].dtype), jnp.zeros((1,), jnp.int32)
  y_TW = _concat(xs, offsets, rows_out, tuple(len(x_TW) for x_TW in xs), implementation)
  return y_TW, jnp.minimum(_starts(offsets)[-1], rows_out)


def _starts(offsets: Sequence[jax.Array]) -> list[jax.Array]:
  """Where array k's rows of each segment begin in the result, for all k; last, all offsets.

  The last entry is offsets_S1 of the result; entry k is of shape (S,).
  """
  offsets_S1 = sum(o_S1 - o_S1[0] for o_S1 in offsets)
  starts = [offsets_S1[:-1]]
  for o_S1 in offsets[:-1]:
    starts.append(starts[-1] + segments.lengths(o_S1))
  return [*starts, offsets_S1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _concat(xs, offsets, rows_out, rows_in, implementation):
  del rows_in
  *starts, out_S1 = _starts(offsets)
  row_T = jnp.arange(rows_out, dtype=jnp.int32)
  segment_T, inside_T = rows.members(out_S1, rows_out)
  sources = []
  for x_TW, start_S, offsets_S1 in zip(xs, starts, offsets):
    place_T = row_T - start_S[segment_T]
    here_T = inside_T & (place_T >= 0) & (place_T < segments.lengths(offsets_S1)[segment_T])
    sources.append((x_TW, jnp.where(here_T, offsets_S1[segment_T] + place_T, -1)))
  return rows.gather(sources, op=_OP, direction="forward", implementation=implementation)


def _concat_forward(xs, offsets, *static):
  return _concat(xs, offsets, *static), offsets


def _concat_backward(rows_out, rows_in, implementation, offsets, dy_TW):
  del rows_out
  *starts, _ = _starts(offsets)
  dxs = []
  for start_S, offsets_S1, rows_k in zip(starts, offsets, rows_in):
    segment_T, inside_T = rows.members(offsets_S1, rows_k)
    place_T = jnp.arange(rows_k, dtype=jnp.int32) - offsets_S1[segment_T]
    index_T = jnp.where(inside_T, start_S[segment_T] + place_T, -1)
    dxs.append(
      rows.gather([(dy_TW, index_T)], op=_OP, direction="backward", implementation=implementation)
    )
  return tuple(dxs), None


_concat.defvjp(_concat_forward, _concat_backward)
