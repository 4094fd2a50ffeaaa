"""Rows of a table looked up and pooled, bag by bag, in one pass.

Letters: S bags, N ids, R rows of the table, W width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, rows, segments
from pallas_kernels.embedding_bag import reference, triton, xla
from pallas_kernels.jagged_pool import triton as pool_triton

_OP = "embedding_bag"
MODES = ("sum", "mean")


def embedding_bag(
  table_RW: jax.Array,
  id_N: jax.Array,
  offsets_S1: jax.Array,
  weight_N: jax.Array | None = None,
  *,
  mode: str,
  implementation: str | None = None,
) -> jax.Array:
  """The weighted sum or mean of the rows that a bag names.

      "sum"   y[s] = sum of weight[n] table[id[n]] over offsets[s] <= n < offsets[s + 1]
      "mean"  y[s] = the sum over the number of ids that are present (not over their weights)

  An id below 0 or from R on is missing: it adds nothing and is not counted, and its weight, which
  may be NaN, gets gradient 0. A bag without ids present gives 0. Sums are taken in float32 (float64
  for float64).

  Differentiable in the weights. Not in the table: its gradient would be dense, an array of the
  table's shape for a handful of rows, so asking for it is an error. Training takes the gradient of
  what follows and hands it on by row:

      y_SW = embedding_bag(table_RW, id_N, offsets_S1, mode="sum")
      dy_SW = jax.grad(loss_of_the_rest)(y_SW)
      grad_NW, _ = embedding_bag_gradients(dy_SW, table_RW, id_N, offsets_S1, mode="sum")
      runs = sorted_runs(id_N, len(table_RW))
      table_RW, v_R = rowwise_adagrad_update(table_RW, v_R, grad_NW, *runs, lr=0.1)

  (`implementation="reference"` is plain JAX and has the dense gradient, for small tables.)

  Args:
    table_RW: float.
    id_N: int32. Ids outside the bags are not looked at.
    offsets_S1: int32, of segments as in `segments`.
    weight_N: float, or None for 1.
    mode: One of `MODES`.
    implementation: As in `dispatch`.

  Returns:
    y_SW of the table's dtype.

  Raises:
    ValueError: Wrong dtypes or ranks, an unknown mode or implementation, a gradient with respect to
      the table.

  Source: `torch.nn.EmbeddingBag`; mean with weights as in FBGEMM's pooled lookup.
  """
  dispatch.check(_OP, implementation)
  table_RW, id_N = jnp.asarray(table_RW), jnp.asarray(id_N)
  offsets_S1 = segments.as_offsets(_OP, "offsets", offsets_S1)
  weight_N = None if weight_N is None else jnp.asarray(weight_N)
  _check(table_RW, id_N, offsets_S1, weight_N, mode)
  if implementation == "reference":
    return reference.embedding_bag(table_RW, id_N, offsets_S1, weight_N, mode)
  return _bag(table_RW, id_N, offsets_S1, weight_N, mode, implementation)


def embedding_bag_gradients(
  dy_SW: jax.Array,
  table_RW: jax.Array,
  id_N: jax.Array,
  offsets_S1: jax.Array,
  weight_N: jax.Array | None = None,
  *,
  mode: str,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients of `embedding_bag` from that of its result: one row for every id.

      grad_row[n]    = scale[s] weight[n] dy[s]           for n in bag s
      grad_weight[n] = scale[s] <table[id[n]], dy[s]>
      scale[s]       = 1 ("sum"), 1 / number of ids present in s ("mean")

  Both are 0 for ids that are missing or in no bag. The table's gradient is the sum of grad_row over
  equal ids, which `rowwise_adagrad_update` takes row by row.

  Args:
    dy_SW: float, the gradient with respect to y.
    table_RW: As in `embedding_bag`, and so are the others.
    id_N: See there.
    offsets_S1: See there.
    weight_N: See there.
    mode: See there.
    implementation: As in `dispatch`.

  Returns:
    grad_row_NW of dy's dtype, and grad_weight_N of the weights' dtype, None without weights.

  Raises:
    ValueError: As `embedding_bag`; dy of another shape than y.
  """
  dispatch.check(_OP, implementation)
  dy_SW, table_RW, id_N = map(jnp.asarray, (dy_SW, table_RW, id_N))
  offsets_S1 = segments.as_offsets(_OP, "offsets", offsets_S1)
  weight_N = None if weight_N is None else jnp.asarray(weight_N)
  _check(table_RW, id_N, offsets_S1, weight_N, mode)
  rows.check_rows(_OP, "dy", dy_SW)
  if dy_SW.shape != (len(offsets_S1) - 1, table_RW.shape[1]):
    raise ValueError(
      f"{_OP}: dy must be of y's shape {(len(offsets_S1) - 1, table_RW.shape[1])}, "
      f"is of {dy_SW.shape}"
    )
  if implementation == "reference":
    return reference.embedding_bag_gradients(dy_SW, table_RW, id_N, offsets_S1, weight_N, mode)
  segment_N, scale_N = _places(table_RW, id_N, offsets_S1, mode)
  if weight_N is not None:
    wide_N = weight_N.astype(jnp.promote_types(dy_SW.dtype, jnp.float32))
    row_scale_N = wide_N if scale_N is None else scale_N * wide_N
  else:
    row_scale_N = scale_N
  grad_row_NW = rows.gather(
    [(dy_SW, segment_N)],
    row_scale_N,
    op=_OP,
    direction="rows_backward",
    implementation=implementation,
  )
  if weight_N is None:
    return grad_row_NW, None
  return grad_row_NW, _weight_gradient(
    dy_SW, table_RW, id_N, segment_N, scale_N, weight_N.dtype, implementation
  )


def _check(table_RW, id_N, offsets_S1, weight_N, mode):
  rows.check_rows(_OP, "table", table_RW)
  if id_N.ndim != 1 or id_N.dtype != jnp.int32:
    raise ValueError(f"{_OP}: ids must be int32 of shape (ids,), are {id_N.dtype} {id_N.shape}")
  if weight_N is not None and (
    weight_N.shape != id_N.shape or not jnp.issubdtype(weight_N.dtype, jnp.floating)
  ):
    raise ValueError(
      f"{_OP}: weights must be floating of the ids' shape {id_N.shape}, "
      f"are {weight_N.dtype} of {weight_N.shape}"
    )
  if mode not in MODES:
    raise ValueError(f"{_OP}: mode must be one of {', '.join(MODES)}, is {mode!r}")


def _present(R: int, id_N: jax.Array) -> jax.Array:
  return (id_N >= 0) & (id_N < R)


def _share(table_RW: jax.Array, id_N: jax.Array, offsets_S1: jax.Array) -> jax.Array:
  """share_S, float32 or wider: what one id present is of its bag's mean."""
  before_N1 = jnp.pad(jnp.cumsum(_present(len(table_RW), id_N), dtype=jnp.int32), (1, 0))
  count_S = segments.lengths(before_N1[offsets_S1])
  return 1 / jnp.maximum(count_S, 1).astype(jnp.promote_types(table_RW.dtype, jnp.float32))


def _places(table_RW, id_N, offsets_S1, mode):
  """segment_N, -1 of an id that is missing or in no bag; scale_N of its bag, or None for 1."""
  N = len(id_N)
  if len(offsets_S1) == 1 or not N:
    return jnp.full((N,), -1, jnp.int32), None
  segment_N, inside_N = rows.members(offsets_S1, N)
  scale_N = _share(table_RW, id_N, offsets_S1)[segment_N] if mode == "mean" else None
  return jnp.where(inside_N & _present(len(table_RW), id_N), segment_N, -1), scale_N


def _weight_gradient(dy_SW, table_RW, id_N, segment_N, scale_N, dtype, implementation):
  if 0 in (*dy_SW.shape, *table_RW.shape, len(id_N)):
    return jnp.zeros(id_N.shape, dtype)
  grad_N = dispatch.dispatch(
    _OP,
    implementation,
    {"xla": xla.row_dots, "triton": functools.partial(triton.row_dots, name=f"{_OP}_backward")},
    dy_SW,
    segment_N,
    table_RW,
    id_N,
    refusal=rows.refusal(table_RW.dtype) or rows.refusal(dy_SW.dtype),
  )
  return (grad_N if scale_N is None else grad_N * scale_N).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _bag(table_RW, id_N, offsets_S1, weight_N, mode, implementation):
  if 0 in (*table_RW.shape, len(id_N), len(offsets_S1) - 1):
    return jnp.zeros((len(offsets_S1) - 1, table_RW.shape[1]), table_RW.dtype)
  scale_S = _share(table_RW, id_N, offsets_S1) if mode == "mean" else None
  return dispatch.dispatch(
    _OP,
    implementation,
    {"xla": xla.embedding_bag, "triton": functools.partial(pool_triton.segment_sum, op=_OP)},
    table_RW,
    offsets_S1,
    scale_S,
    id_N,
    weight_N,
    refusal=rows.refusal(table_RW.dtype),
  )


def _bag_forward(table, ids, offsets, weights, mode, implementation):
  if table.perturbed:
    raise ValueError(
      f"{_OP}: the gradient with respect to the table would be dense, of its shape "
      f"{table.value.shape}; differentiate what follows and take embedding_bag_gradients"
    )
  table_RW, id_N, offsets_S1 = table.value, ids.value, offsets.value
  weight_N = None if weights is None else weights.value
  residuals = table_RW, id_N, offsets_S1, weight_N
  return _bag(*residuals, mode, implementation), residuals


def _bag_backward(mode, implementation, residuals, dy_SW):
  table_RW, id_N, offsets_S1, weight_N = residuals
  if weight_N is None or isinstance(dy_SW, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  segment_N, scale_N = _places(table_RW, id_N, offsets_S1, mode)
  grad_weight_N = _weight_gradient(
    dy_SW, table_RW, id_N, segment_N, scale_N, weight_N.dtype, implementation
  )
  return None, None, None, grad_weight_N


_bag.defvjp(_bag_forward, _bag_backward, symbolic_zeros=True)
