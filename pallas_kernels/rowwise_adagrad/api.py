"""Row-wise AdaGrad on sorted runs of equal ids: summed, squared, written, in one pass.

Letters: R rows of the table, W width, N gradients, U different rows (at most N).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import noise
from pallas_kernels.dispatch import dispatch
from pallas_kernels.rowwise_adagrad import reference, triton, xla
from pallas_kernels.rowwise_adagrad.rule import Rule

OP = "rowwise_adagrad_update"


def rowwise_adagrad_update(
  table_RW: jax.Array,
  v_R: jax.Array,
  grad_NW: jax.Array,
  order_N: jax.Array,
  segment_N: jax.Array,
  unique_U: jax.Array,
  *,
  lr: jax.Array | float,
  eps: float = 1e-8,
  l2: float = 0.0,
  accumulated: float = 1.0,
  key: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The table and its accumulator after one step; rows that no gradient names keep their bits.

      r = unique[u],   g = sum of grad[order[i]] over segment[i] = u,   g += l2 w_r
      v_r += mean_w(g^2)
      w_r -= lr g / (sqrt(v_r / accumulated) + eps)

  Equal ids are summed in a fixed order, without atomics: the same bits in every run (but not by
  "xla" on a GPU, which adds atomically). The kernel
  reads each gradient and reads and writes each named row once, in place where the caller donates
  `table_RW` and `v_R` (otherwise XLA copies them first), and its temporaries follow N W / 64. A run
  of any length is cut into tiles of 128 that are summed side by side, their sums likewise.

  It has no gradient: differentiating it is a TypeError.

  Args:
    table_RW: float32 or bfloat16; the arithmetic is float32. (float64 in all float64: "reference"
      and "xla" only.)
    v_R: float32, mean squares accumulated so far.
    grad_NW: Gradients of the looked-up rows, floating.
    order_N: int32, where the i-th smallest id stands in `grad_NW`.
    segment_N: int32, the run it belongs to, ascending from 0 without gaps.
    unique_U: int32, the row of every run, no row twice; what is not in [0, R) is padding: it
      updates nothing and its gradients are not read.
    lr: Learning rate, scalar.
    eps: Keeps the step of a row without a past finite.
    l2: Weight decay as part of the gradient, of the named rows only.
    accumulated: How many times too fast v grows, where replicas average it (models.md section 5).
    key: Rounds a bfloat16 table stochastically, E[new] exact; None rounds to nearest.
    implementation: See `pallas_kernels.dispatch`.

  Raises:
    ValueError: Shapes or dtypes that do not fit each other.

  Source: FBGEMM's EXACT_ROWWISE_ADAGRAD; Gupta et al. 2014 (row-wise AdaGrad).
  """
  arrays = (table_RW, v_R, grad_NW, order_N, segment_N, unique_U)
  table_RW, v_R, grad_NW, order_N, segment_N, unique_U = map(jnp.asarray, arrays)
  _check(table_RW, v_R, grad_NW, order_N, segment_N, unique_U)
  lr = jnp.asarray(lr, v_R.dtype)
  if lr.shape:
    raise ValueError(f"{OP}: lr must be a scalar, is of shape {lr.shape}")
  words = None
  if key is not None:
    if table_RW.dtype != jnp.bfloat16:
      raise ValueError(f"{OP}: key rounds bfloat16 tables, and this one is {table_RW.dtype}")
    words = noise.words_of(OP, key)
  if not len(order_N) or not len(unique_U) or not table_RW.size:
    return table_RW, v_R
  rule = Rule(eps=eps, l2=l2, accumulated=accumulated)
  arrays = (table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, words)
  return _update(rule, implementation, *arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _update(rule: Rule, implementation: str | None, *arrays):
  modules = {"reference": reference, "xla": xla, "triton": triton}
  bound = {name: functools.partial(m.update, rule) for name, m in modules.items()}
  table_RW = arrays[0]
  refusal = None
  if table_RW.dtype not in (jnp.float32, jnp.bfloat16):
    refusal = f"its kernel takes tables of float32 and bfloat16, and this one is {table_RW.dtype}"
  elif table_RW.shape[1] > triton.MAX_WIDTH:
    refusal = f"its kernel takes rows of at most {triton.MAX_WIDTH}, these have {table_RW.shape[1]}"
  return dispatch(OP, implementation, bound, *arrays, refusal=refusal)


@_update.defjvp
def _no_gradient(rule, implementation, primals, tangents):
  raise TypeError(f"{OP} has no gradient: it is the optimiser's step, so take gradients before it")


def _check(table_RW, v_R, grad_NW, order_N, segment_N, unique_U) -> None:
  if table_RW.ndim != 2 or not jnp.issubdtype(table_RW.dtype, jnp.floating):
    raise ValueError(
      f"{OP}: table must be floating of shape (rows, width), "
      f"is {table_RW.dtype} of shape {table_RW.shape}"
    )
  wanted = jnp.promote_types(table_RW.dtype, jnp.float32)
  if v_R.shape != table_RW.shape[:1] or v_R.dtype != wanted:
    raise ValueError(
      f"{OP}: v must be {wanted} of shape {table_RW.shape[:1]}, one a row of the table, "
      f"is {v_R.dtype} of shape {v_R.shape}"
    )
  rows, width = order_N.size, table_RW.shape[1]
  if grad_NW.shape != (rows, width) or not jnp.issubdtype(grad_NW.dtype, jnp.floating):
    raise ValueError(
      f"{OP}: grad must be floating of shape {(rows, width)}, (length of order, width of the "
      f"table), is {grad_NW.dtype} of shape {grad_NW.shape}"
    )
  for name, array, shape in (
    ("order", order_N, (rows,)),
    ("segment", segment_N, (rows,)),
    ("unique", unique_U, (unique_U.size,)),
  ):
    if array.shape != shape or array.dtype != jnp.int32:
      raise ValueError(
        f"{OP}: {name} must be int32 of shape {shape}, is {array.dtype} of shape {array.shape}"
      )
