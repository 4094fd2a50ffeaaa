"""Pallas kernels in the Triton lowering: one program a tile and head, no atomics, nothing shared.

forward          a tile of queries goes over the keys it sees (FlashAttention-2, arXiv 2307.08691)
backward_queries the same again for the gradients of queries and of bias tables
backward_keys    a tile of keys goes over the queries that see it

The grid's bound knows no lengths (tiles.bound), so its last programs may find no rows and end at once.
Letters: B queries and K keys of a tile, T queries, E keys, H heads, D width, W the power of two above
it, N tiles, F columns of a bias table.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.jagged_attention import tiles
from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form, Gradients, Plan, Saved

WIDTHS = (16, 256)  # Tensor cores take no less than 16; registers hold no more than 256.
MOST_BUCKETS = 512
_WHOLE = pl.no_block_spec


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
  """Rows of a tile of queries and of keys, warps of a program, stages of its software pipeline."""

  queries: int
  keys: int
  warps: int
  stages: int


def launch(width: int, itemsize: int, direction: str) -> Launch:
  """Tiles without spilled registers on sm_80, sm_90a and sm_100a (python -m pallas_kernels.report)."""
  heavy = width * itemsize > 256
  if direction == "forward":
    return Launch(64, 32 if heavy else 64, 4, 2)
  return Launch(32 if heavy else 64, 32 if heavy else 64, 4, 1 if heavy else 2)


def refusal(q_THD: jax.Array, k_EHD: jax.Array, tables: tuple[jax.Array, ...]) -> str | None:
  """Why the kernels cannot do it; None where they can."""
  width = q_THD.shape[2]
  if q_THD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"its dtypes are float32, bfloat16 and float16, not {q_THD.dtype}"
  if not WIDTHS[0] <= width <= WIDTHS[1]:
    return f"a head's width must lie in {WIDTHS[0]} to {WIDTHS[1]}, is {width}"
  for table_HN in tables:
    if table_HN.shape[1] > MOST_BUCKETS:
      return f"a bias table may have {MOST_BUCKETS} buckets, has {table_HN.shape[1]}"
  if not len(q_THD) or not len(k_EHD):
    return f"there are {len(q_THD)} queries and {len(k_EHD)} keys"
  return None


def _power(width: int) -> int:
  return max(16, pl.next_power_of_2(width))


class _Rows:
  """Rows of a tile: loads them as zeros where they are not its own, and stores only its own."""

  def __init__(self, start, stop, count: int, head, width: int):
    self.row_B = start + jnp.arange(count, dtype=jnp.int32)
    self.own_B = self.row_B < stop
    self.head, self.width = head, width

  def _place(self, ref):
    padded = _power(self.width)
    column_W = jnp.arange(padded, dtype=jnp.int32)
    mask = self.own_B[:, None]
    if padded != self.width:
      mask = mask & (column_W < self.width)[None, :]
    return ref.at[self.row_B[:, None], self.head, column_W[None, :]], mask

  def load(self, ref):
    """(B, W) of a (T, H, D) array."""
    place, mask = self._place(ref)
    return plgpu.load(place, mask=mask, other=0)

  def store(self, ref, x_BW):
    place, mask = self._place(ref)
    plgpu.store(place, x_BW.astype(ref.dtype), mask=mask)

  def of_vector(self, ref):
    """(B,) of a (T,) array."""
    return plgpu.load(ref.at[self.row_B], mask=self.own_B, other=0)

  def of_heads(self, ref):
    """(B,) of a (H, T) array."""
    return plgpu.load(ref.at[self.head, self.row_B], mask=self.own_B, other=0)


def _over(first, last, block: int, body, carry):
  """carry = body(start of a tile, carry) from first to last, which need not divide by `block`."""
  return jax.lax.fori_loop(
    0, pl.cdiv(last - first, block), lambda j, c: body(first + j * block, c), carry
  )


def _biased(form: Form, score, tables, head, x_qs, x_ks):
  """(score with biases, bucket of every pair and bias)."""
  found = []
  for buckets, table_ref, x_q, x_k in zip(form.biases, tables, x_qs, x_ks):
    bucket = buckets(x_q - x_k, table_ref.shape[1])
    score += plgpu.load(table_ref.at[head, bucket]).astype(jnp.float32)
    found.append(bucket)
  return score, found


def _ids(heads: int):
  # Heads lie beside each other in memory: neighbours in time share lines of the cache.
  program = pl.program_id(0)
  return program // heads, program % heads


def _forward_kernel(form, shape: Launch, width, heads, biased, *refs):
  start_N, stop_N, first_N, last_N, lo_T, hi_T, gain_T, q_ref, k_ref, v_ref, *rest = refs
  tables, x_qs, x_ks, (out_ref, *log_ref) = _split(rest, biased)
  tile, head = _ids(heads)
  queries = _Rows(start_N[tile], stop_N[tile], shape.queries, head, width)
  q_BW = queries.load(q_ref)
  lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
  gain_B = None if form.softmax else queries.of_vector(gain_T)
  x_qs = [queries.of_vector(x)[:, None] for x in x_qs]
  last = last_N[tile]

  def body(start, sums):
    out_BW, top_B, sum_B = sums
    keys = _Rows(start, last, shape.keys, head, width)
    k_KW = keys.load(k_ref)
    v_KW = keys.load(v_ref)
    score = plgpu.dot(q_BW, k_KW, trans_b=True).astype(jnp.float32) * form.scale
    x_keys = [keys.of_vector(x)[None, :] for x in x_ks]
    score, _ = _biased(form, score, tables, head, x_qs, x_keys)
    seen = (keys.row_B[None, :] >= lo_B[:, None]) & (keys.row_B[None, :] < hi_B[:, None])
    if form.softmax:
      score = jnp.where(seen, score, -jnp.inf)
      higher_B = jnp.maximum(top_B, jnp.max(score, axis=1))
      anchor_B = jnp.where(higher_B == -jnp.inf, 0.0, higher_B)
      weight = jnp.exp(score - anchor_B[:, None])
      shrink_B = jnp.exp(top_B - anchor_B)
      out_BW = out_BW * shrink_B[:, None]
      sum_B = sum_B * shrink_B + jnp.sum(weight, axis=1)
      top_B = higher_B
    else:
      weight = POINTWISE[form.activation].value(score) * gain_B[:, None]
      weight = jnp.where(seen, weight, 0.0)
    return out_BW + plgpu.dot(weight.astype(v_KW.dtype), v_KW), top_B, sum_B

  zero_B = jnp.zeros((shape.queries,), jnp.float32)
  start = jnp.zeros((shape.queries, _power(width)), jnp.float32), zero_B - jnp.inf, zero_B
  out_BW, top_B, sum_B = _over(first_N[tile], last, shape.keys, body, start)
  if form.softmax:
    sum_B = jnp.where(sum_B > 0, sum_B, 1.0)
    out_BW = out_BW / sum_B[:, None]
    log_B = jnp.where(top_B == -jnp.inf, 0.0, top_B) + jnp.log(sum_B)
    plgpu.store(log_ref[0].at[head, queries.row_B], log_B, mask=queries.own_B)
  queries.store(out_ref, out_BW)


def _split(rest, biased: int):
  """(tables, query coordinates, key coordinates, outputs)."""
  return rest[:biased], rest[biased : 2 * biased], rest[2 * biased : 3 * biased], rest[3 * biased :]


def _slopes(form: Form, score, seen, pull, log, delta, gain):
  """(weight, d loss / d score) of one pair of tiles; `pull` is d loss / d weight."""
  if form.softmax:
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, score, 0.0) - log), 0.0)
    return weight, weight * (pull - delta)
  f = POINTWISE[form.activation]
  weight = jnp.where(seen, f.value(score) * gain, 0.0)
  return weight, jnp.where(seen, f.slope(score) * gain * pull, 0.0)


def _row_terms(form: Form, rows: _Rows, log_HT, delta_HT, gain_T):
  """(log, delta, gain) of the rows, as far as the activation has them."""
  if form.softmax:
    return rows.of_heads(log_HT), rows.of_heads(delta_HT), jnp.zeros((), jnp.float32)
  return *(jnp.zeros((), jnp.float32),) * 2, rows.of_vector(gain_T)


def _backward_queries_kernel(form, shape: Launch, width, heads, biased, *refs):
  start_N, stop_N, first_N, last_N, lo_T, hi_T, gain_T, log_HT, delta_HT, *refs = refs
  q_ref, k_ref, v_ref, g_ref, *rest = refs
  tables, x_qs, x_ks, (dq_ref, *dtable_refs) = _split(rest, biased)
  tile, head = _ids(heads)
  queries = _Rows(start_N[tile], stop_N[tile], shape.queries, head, width)
  q_BW, g_BW = queries.load(q_ref), queries.load(g_ref)
  lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
  terms = [x[:, None] if x.ndim else x for x in _row_terms(form, queries, log_HT, delta_HT, gain_T)]
  x_qs = [queries.of_vector(x)[:, None] for x in x_qs]
  last = last_N[tile]

  def body(start, sums):
    dq_BW, *dtables = sums
    keys = _Rows(start, last, shape.keys, head, width)
    k_KW, v_KW = keys.load(k_ref), keys.load(v_ref)
    score = plgpu.dot(q_BW, k_KW, trans_b=True).astype(jnp.float32) * form.scale
    x_keys = [keys.of_vector(x)[None, :] for x in x_ks]
    score, found = _biased(form, score, tables, head, x_qs, x_keys)
    seen = (keys.row_B[None, :] >= lo_B[:, None]) & (keys.row_B[None, :] < hi_B[:, None])
    pull = plgpu.dot(g_BW, v_KW, trans_b=True)
    _, slope = _slopes(form, score, seen, pull, *terms)
    dtables = [_add_buckets(d, slope, bucket) for d, bucket in zip(dtables, found)]
    return dq_BW + plgpu.dot(slope.astype(k_KW.dtype), k_KW), *dtables

  zeros = [jnp.zeros((_power(ref.shape[1]),), jnp.float32) for ref in tables]
  start = jnp.zeros((shape.queries, _power(width)), jnp.float32), *zeros
  dq_BW, *dtables = _over(first_N[tile], last, shape.keys, body, start)
  queries.store(dq_ref, dq_BW * form.scale)
  for ref, sum_F in zip(dtable_refs, dtables):
    column_F = jnp.arange(len(sum_F), dtype=jnp.int32)
    plgpu.store(ref.at[tile, head, column_F], sum_F, mask=column_F < ref.shape[2])


def _add_buckets(sum_F, slope, bucket):
  """Adds to every bucket the slopes of its pairs.

  Bucket by bucket between the least and the greatest of the tile: few, but for the tiles nearest to
  the diagonal, and the same bits in every run, which atomic additions do not give.
  """
  column_F = jnp.arange(len(sum_F), dtype=jnp.int32)

  def body(b, sum_F):
    total = jnp.sum(jnp.where(bucket == b, slope, 0.0))
    return jnp.where(column_F == b, sum_F + total, sum_F)

  return jax.lax.fori_loop(jnp.min(bucket), jnp.max(bucket) + 1, body, sum_F)


def _backward_keys_kernel(form, shape: Launch, width, heads, biased, *refs):
  start_N, stop_N, first_N, last_N, lo_T, hi_T, gain_T, log_HT, delta_HT, *refs = refs
  q_ref, k_ref, v_ref, g_ref, *rest = refs
  tables, x_qs, x_ks, (dk_ref, dv_ref) = _split(rest, biased)
  tile, head = _ids(heads)
  keys = _Rows(start_N[tile], stop_N[tile], shape.keys, head, width)
  k_KW, v_KW = keys.load(k_ref), keys.load(v_ref)
  x_ks = [keys.of_vector(x)[:, None] for x in x_ks]
  last = last_N[tile]

  def body(start, sums):
    # All pairs lie transposed, (K, B), so that both sums are plain products of a row of tiles.
    dk_KW, dv_KW = sums
    queries = _Rows(start, last, shape.queries, head, width)
    q_BW, g_BW = queries.load(q_ref), queries.load(g_ref)
    lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
    score = plgpu.dot(k_KW, q_BW, trans_b=True).astype(jnp.float32) * form.scale
    x_queries = [queries.of_vector(x)[None, :] for x in x_qs]
    score, _ = _biased(form, score, tables, head, x_queries, x_ks)
    seen = (keys.row_B[:, None] >= lo_B[None, :]) & (keys.row_B[:, None] < hi_B[None, :])
    pull = plgpu.dot(v_KW, g_BW, trans_b=True)
    terms = [
      x[None, :] if x.ndim else x for x in _row_terms(form, queries, log_HT, delta_HT, gain_T)
    ]
    weight, slope = _slopes(form, score, seen, pull, *terms)
    dv_KW = dv_KW + plgpu.dot(weight.astype(g_BW.dtype), g_BW)
    return dk_KW + plgpu.dot(slope.astype(q_BW.dtype), q_BW), dv_KW

  zero = jnp.zeros((shape.keys, _power(width)), jnp.float32)
  dk_KW, dv_KW = _over(first_N[tile], last, shape.queries, body, (zero, zero))
  keys.store(dk_ref, dk_KW * form.scale)
  keys.store(dv_ref, dv_KW)


def _call(
  kernel, name, form, shape: Launch, cut: tiles.Tiles, q_THD, tables, plan, args, outputs, interpret
):
  _, heads, width = q_THD.shape
  body = functools.partial(kernel, form, shape, width, heads, len(tables))
  args = (*cut, plan.lo_T, plan.hi_T, plan.gain_T, *args)
  args += (*tables, *plan.q_coordinates, *plan.kv_coordinates)
  return pl.pallas_call(
    body,
    grid=(len(cut.start_N) * heads,),
    in_specs=[_WHOLE] * len(args),
    out_specs=[_WHOLE] * len(outputs),
    out_shape=outputs,
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
    name=f"jagged_attention_{name}",
  )(*args)


def forward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, *, interpret: bool) -> Saved:
  """The output, and of a softmax the logarithm of its denominators."""
  count, heads, width = q_THD.shape
  shape = launch(width, q_THD.dtype.itemsize, "forward")
  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, shape.queries)
  outputs = [jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype)]
  if form.softmax:
    outputs.append(jax.ShapeDtypeStruct((heads, count), jnp.float32))
  args = (q_THD, k_EHD, v_EHD)
  out_THD, *log_HT = _call(
    _forward_kernel, "forward", form, shape, cut, q_THD, tables, plan, args, outputs, interpret
  )
  return Saved(out_THD, log_HT[0].T if log_HT else jnp.zeros((0, 0), jnp.float32))


def backward(
  form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, saved: Saved, g_THD, *, interpret: bool
) -> Gradients:
  """Gradients of queries and tables by one kernel, of keys and values by another."""
  heads, width = q_THD.shape[1:]
  log_HT, delta_HT = (jnp.zeros((1, 1), jnp.float32),) * 2  # A kernel takes no empty array.
  if form.softmax:
    delta_HT = jnp.einsum("thd,thd->ht", saved.out_THD, g_THD, preferred_element_type=jnp.float32)
    log_HT = saved.log_TH.T
  args = (log_HT, delta_HT, q_THD, k_EHD, v_EHD, g_THD)
  run = functools.partial(
    _call, q_THD=q_THD, tables=tables, plan=plan, args=args, interpret=interpret
  )

  shape = launch(width, q_THD.dtype.itemsize, "backward_queries")
  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, shape.queries)
  sums = [jax.ShapeDtypeStruct((len(cut.start_N), heads, t.shape[1]), jnp.float32) for t in tables]
  outputs = [jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype), *sums]
  dq_THD, *parts = run(
    _backward_queries_kernel, "backward_queries", form, shape, cut, outputs=outputs
  )

  shape = launch(width, q_THD.dtype.itemsize, "backward_keys")
  cut = tiles.key_tiles(plan.kv_offsets_S1, plan.lo_T, plan.hi_T, len(k_EHD), shape.keys)
  outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_EHD, v_EHD)]
  dk_EHD, dv_EHD = run(_backward_keys_kernel, "backward_keys", form, shape, cut, outputs=outputs)
  return Gradients(dq_THD, dk_EHD, dv_EHD, tuple(jnp.sum(p_NHF, axis=0) for p_NHF in parts))
