"""Triton kernels of the backward pass. Letters as in triton.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form
from pallas_kernels.jagged_attention.triton_rows import (
  LOG2_E,
  Launch,
  Rows,
  Stretch,
  biased_score,
  ids,
  lean,
  power,
  split,
)


def _slopes(form: Form, f, score, seen, pull, log2, delta, gain):
  """(weight, d loss / d score) of one pair of tiles; `pull` is d loss / d weight.

  `seen` is None where all is.
  """
  masked = lambda x: x if seen is None else jnp.where(seen, x, 0.0)
  if form.softmax:
    weight = masked(f.exp2(masked(score) - log2))
    return weight, weight * (pull - delta)
  of = POINTWISE[form.activation]
  weight = masked(of.value(score, f.sigmoid) * gain)
  return weight, masked(of.slope(score, f.sigmoid) * gain * pull)


def _row_terms(form: Form, rows: Rows, log2_HT, delta_HT, gain_T):
  """(log2, delta, gain) of the rows, as far as the activation has them."""
  if form.softmax:
    return rows.of_heads(log2_HT), rows.of_heads(delta_HT), jnp.zeros((), jnp.float32)
  return *(jnp.zeros((), jnp.float32),) * 2, rows.of_vector(gain_T)


def of_queries(form, shape: Launch, f, width, heads, biased, *refs):
  start_N, stop_N, *stretch, lo_T, hi_T, gain_T, log2_HT, delta_HT = refs[:11]
  refs = refs[11:]
  q_ref, k_ref, v_ref, g_ref, *rest = refs
  tables, x_qs, x_ks, (dq_ref, *dtable_refs) = split(rest, biased)
  tile, head = ids(heads)
  queries = Rows(start_N[tile], stop_N[tile], shape.queries, head, width)
  q_BW, g_BW = queries.load(q_ref), queries.load(g_ref)
  lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
  terms = [
    x[:, None] if x.ndim else x for x in _row_terms(form, queries, log2_HT, delta_HT, gain_T)
  ]
  x_qs = [queries.of_vector(x)[:, None] for x in x_qs]
  stretch = Stretch(*(ref[tile] for ref in stretch))
  unit = LOG2_E if form.softmax else 1.0

  def body(start, inner, sums):
    dq_BW, *dtables = sums
    keys = Rows(start, stretch.last, shape.keys, head, width)
    k_KW, v_KW = keys.load(k_ref, inner), keys.load(v_ref, inner)
    score = plgpu.dot(q_BW, k_KW, trans_b=True).astype(jnp.float32) * (form.scale * unit)
    x_keys = [keys.of_vector(x)[None, :] for x in x_ks]
    score, found = biased_score(form, score, tables, head, x_qs, x_keys, unit)
    seen = (keys.row_B[None, :] >= lo_B[:, None]) & (keys.row_B[None, :] < hi_B[:, None])
    seen = None if inner else seen
    pull = plgpu.dot(g_BW, v_KW, trans_b=True)
    _, slope = _slopes(form, f, score, seen, pull, *terms)
    dtables = [_add_buckets(d, slope, bucket) for d, bucket in zip(dtables, found)]
    return dq_BW + plgpu.dot(slope.astype(k_KW.dtype), k_KW), *dtables

  zeros = [jnp.zeros((power(ref.shape[1]),), jnp.float32) for ref in tables]
  start = jnp.zeros((shape.queries, power(width)), jnp.float32), *zeros
  dq_BW, *dtables = stretch.over(shape.keys, body, start, divided=lean(q_ref, biased))
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


def of_keys(form, shape: Launch, f, width, heads, biased, *refs):
  start_N, stop_N, *stretch, lo_T, hi_T, gain_T, log2_HT, delta_HT = refs[:11]
  refs = refs[11:]
  q_ref, k_ref, v_ref, g_ref, *rest = refs
  tables, x_qs, x_ks, (dk_ref, dv_ref) = split(rest, biased)
  tile, head = ids(heads)
  keys = Rows(start_N[tile], stop_N[tile], shape.keys, head, width)
  k_KW, v_KW = keys.load(k_ref), keys.load(v_ref)
  x_ks = [keys.of_vector(x)[:, None] for x in x_ks]
  stretch = Stretch(*(ref[tile] for ref in stretch))
  unit = LOG2_E if form.softmax else 1.0

  def body(start, inner, sums):
    # All pairs lie transposed, (K, B), so that both sums are plain products of a row of tiles.
    dk_KW, dv_KW = sums
    queries = Rows(start, stretch.last, shape.queries, head, width)
    q_BW, g_BW = queries.load(q_ref, inner), queries.load(g_ref, inner)
    lo_B, hi_B = queries.of_vector(lo_T), queries.of_vector(hi_T)
    score = plgpu.dot(k_KW, q_BW, trans_b=True).astype(jnp.float32) * (form.scale * unit)
    x_queries = [queries.of_vector(x)[None, :] for x in x_qs]
    score, _ = biased_score(form, score, tables, head, x_queries, x_ks, unit)
    seen = (keys.row_B[:, None] >= lo_B[None, :]) & (keys.row_B[:, None] < hi_B[None, :])
    seen = None if inner else seen
    pull = plgpu.dot(v_KW, g_BW, trans_b=True)
    terms = [
      x[None, :] if x.ndim else x for x in _row_terms(form, queries, log2_HT, delta_HT, gain_T)
    ]
    weight, slope = _slopes(form, f, score, seen, pull, *terms)
    dv_KW = dv_KW + plgpu.dot(weight.astype(g_BW.dtype), g_BW)
    return dk_KW + plgpu.dot(slope.astype(q_BW.dtype), q_BW), dv_KW

  zero = jnp.zeros((shape.keys, power(width)), jnp.float32)
  dk_KW, dv_KW = stretch.over(shape.queries, body, (zero, zero), divided=lean(q_ref, biased))
  keys.store(dk_ref, dk_KW * form.scale)
  keys.store(dv_ref, dv_KW)
