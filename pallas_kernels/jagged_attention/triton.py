"""Pallas kernels in the Triton lowering: one program a tile and head, no atomics, nothing shared.

forward          a tile of queries goes over the keys it sees (FlashAttention-2, arXiv 2307.08691)
backward_queries the same again for the gradients of queries and of bias tables
backward_keys    a tile of keys goes over the queries that see it

The grid's bound knows no lengths (tiles.bound), so its last programs may find no rows and end at
once. Letters: B queries and K keys of a tile, T queries, E keys, H heads, D width, W the power of
two above it, N tiles, F columns of a bias table.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import generation
from pallas_kernels.jagged_attention import tiles, triton_backward
from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form, Gradients, Plan, Saved
from pallas_kernels.jagged_attention.triton_rows import (
  LOG2_E,
  Launch,
  Rows,
  Stretch,
  biased_score,
  functions,
  ids,
  lean,
  power,
  split,
)

WIDTHS = (1, 256)  # Below 16, as tensor cores want, tiles are padded; registers hold no more.
MOST_BUCKETS = 512
_WHOLE = pl.no_block_spec
_HOPPER = {  # (width, direction, biased), of bf16 and fp16.
  (32, "forward", False): Launch(64, 64, 4, 3),
  (32, "backward_queries", False): Launch(64, 64, 4, 2),
  (32, "backward_keys", False): Launch(64, 64, 4, 2),
  (64, "forward", False): Launch(64, 64, 4, 3),
  (64, "backward_queries", False): Launch(64, 64, 4, 3),
  (64, "backward_keys", False): Launch(64, 64, 4, 3),
  (64, "forward", True): Launch(64, 32, 4, 1),
  (64, "backward_queries", True): Launch(64, 32, 4, 1),
  (64, "backward_keys", True): Launch(64, 64, 4, 1),
  (128, "forward", False): Launch(64, 64, 4, 3),
  (128, "backward_queries", False): Launch(64, 64, 4, 2),
  (128, "backward_keys", False): Launch(32, 64, 4, 4),
  (128, "forward", True): Launch(64, 32, 4, 1),
  (128, "backward_queries", True): Launch(64, 32, 4, 1),
}


def launch(width: int, itemsize: int, biased: bool, direction: str) -> Launch:
  """Tiles whose registers do not spill on sm_80, sm_90a and sm_100a (pallas_kernels.report).

  Registers grow with the bytes of a row, twice as much where float32 goes to tensor cores as TF32.
  A bias needs an address for every pair, and masked columns a mask. Hopper's are the fastest of
  those, on an H100.
  """
  measured = _HOPPER.get((width, direction, biased)) if itemsize == 2 else None
  if measured and (generation.target() or generation.HOPPER) == generation.HOPPER:
    return measured
  padded = power(width)
  load = padded * itemsize * (2 if itemsize == 4 else 1)
  short = itemsize == 4 and padded <= 32
  if biased:
    return Launch(64 if 128 <= load <= 256 and not short else 32, 32 if load <= 256 else 16, 8, 1)
  if load > 512 or short:
    return Launch(32, 32 if load <= 1024 else 16, 8, 1)
  if padded != width:
    return Launch(64, 32, 8, 1)
  if load == 256 and direction == "forward":
    return Launch(64, 32, 4, 2)
  return Launch(64, 64 if 128 <= load <= 256 else 32, 8, 2)


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


def _forward_kernel(form, shape: Launch, f, width, heads, biased, *refs):
  start_N, stop_N, *stretch, lo_T, hi_T, gain_T, q_ref, k_ref, v_ref = refs[:12]
  rest = refs[12:]
  tables, x_qs, x_ks, (out_ref, *log_ref) = split(rest, biased)
  tile, head = ids(heads)
  queries = Rows(start_N[tile], stop_N[tile], shape.queries, head, width)
  q_BW = queries.load(q_ref)
  lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
  gain_B = None if form.softmax else queries.of_vector(gain_T)
  x_qs = [queries.of_vector(x)[:, None] for x in x_qs]
  stretch = Stretch(*(ref[tile] for ref in stretch))
  unit = LOG2_E if form.softmax else 1.0  # The softmax is one of powers of two.

  def body(start, inner, sums):
    out_BW, top_B, sum_B = sums
    keys = Rows(start, stretch.last, shape.keys, head, width)
    k_KW = keys.load(k_ref, inner)
    v_KW = keys.load(v_ref, inner)
    score = plgpu.dot(q_BW, k_KW, trans_b=True).astype(jnp.float32) * (form.scale * unit)
    x_keys = [keys.of_vector(x)[None, :] for x in x_ks]
    score, _ = biased_score(form, score, tables, head, x_qs, x_keys, unit)
    seen = (keys.row_B[None, :] >= lo_B[:, None]) & (keys.row_B[None, :] < hi_B[:, None])
    if form.softmax:
      score = score if inner else jnp.where(seen, score, -jnp.inf)
      higher_B = jnp.maximum(top_B, jnp.max(score, axis=1))
      anchor_B = jnp.where(higher_B == -jnp.inf, 0.0, higher_B)
      weight = f.exp2(score - anchor_B[:, None])
      shrink_B = f.exp2(top_B - anchor_B)
      out_BW = out_BW * shrink_B[:, None]
      sum_B = sum_B * shrink_B + jnp.sum(weight, axis=1)
      top_B = higher_B
    else:
      weight = POINTWISE[form.activation].value(score, f.sigmoid) * gain_B[:, None]
      weight = weight if inner else jnp.where(seen, weight, 0.0)
    return out_BW + plgpu.dot(weight.astype(v_KW.dtype), v_KW), top_B, sum_B

  zero_B = jnp.zeros((shape.queries,), jnp.float32)
  start = jnp.zeros((shape.queries, power(width)), jnp.float32), zero_B - jnp.inf, zero_B
  out_BW, top_B, sum_B = stretch.over(shape.keys, body, start, divided=lean(q_ref, biased))
  if form.softmax:
    sum_B = jnp.where(sum_B > 0, sum_B, 1.0)
    out_BW = out_BW / sum_B[:, None]
    log_B = jnp.where(top_B == -jnp.inf, 0.0, top_B) / LOG2_E + jnp.log(sum_B)
    plgpu.store(log_ref[0].at[head, queries.row_B], log_B, mask=queries.own_B)
  queries.store(out_ref, out_BW)


def _call(
  kernel, name, form, shape: Launch, cut: tiles.Tiles, q_THD, tables, plan, args, outputs, interpret
):
  _, heads, width = q_THD.shape
  f = functions(q_THD.dtype, interpret)
  body = functools.partial(kernel, form, shape, f, width, heads, len(tables))
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
  shape = launch(width, q_THD.dtype.itemsize, bool(tables), "forward")
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
  log2_HT, delta_HT = (jnp.zeros((1, 1), jnp.float32),) * 2  # A kernel takes no empty array.
  if form.softmax:
    delta_HT = jnp.einsum("thd,thd->ht", saved.out_THD, g_THD, preferred_element_type=jnp.float32)
    log2_HT = saved.log_TH.T * LOG2_E
  args = (log2_HT, delta_HT, q_THD, k_EHD, v_EHD, g_THD)
  run = functools.partial(
    _call, q_THD=q_THD, tables=tables, plan=plan, args=args, interpret=interpret
  )

  shape = launch(width, q_THD.dtype.itemsize, bool(tables), "backward_queries")
  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, shape.queries)
  sums = [jax.ShapeDtypeStruct((len(cut.start_N), heads, t.shape[1]), jnp.float32) for t in tables]
  outputs = [jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype), *sums]
  dq_THD, *parts = run(
    triton_backward.of_queries, "backward_queries", form, shape, cut, outputs=outputs
  )

  shape = launch(width, q_THD.dtype.itemsize, bool(tables), "backward_keys")
  cut = tiles.key_tiles(plan.kv_offsets_S1, plan.lo_T, plan.hi_T, len(k_EHD), shape.keys)
  outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_EHD, v_EHD)]
  dk_EHD, dv_EHD = run(triton_backward.of_keys, "backward_keys", form, shape, cut, outputs=outputs)
  return Gradients(dq_THD, dk_EHD, dv_EHD, tuple(jnp.sum(p_NHF, axis=0) for p_NHF in parts))
