"""Plain JAX: the tiles that a GPU works on one by one, a few of equal cost at a time.

The costliest come first and the loops end where the work does, so time follows the pairs seen.
Letters: C tiles at a time, B queries and K keys of a tile, T queries, E keys, H heads, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.jagged_attention import tiles
from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form, Gradients, Plan, Saved, wide

BLOCK_Q, BLOCK_K = 64, 64
AT_A_TIME = 8  # C: enough that the loop costs nothing, few enough that their costs are equal.


def _take(x_TX: jax.Array, row_CB: jax.Array, inside_CB: jax.Array) -> jax.Array:
  """Rows of a jagged array, floats in full precision; 0 where not inside, whatever lies there."""
  x = x_TX.at[row_CB].get(mode="clip")
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(wide(x))  # XLA has no product of bf16 tiles with float32 sums on a CPU.
  return jnp.where(inside_CB.reshape(inside_CB.shape + (1,) * (x.ndim - 2)), x, 0)


def _rows(start_C: jax.Array, stop_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  row_CB = start_C[:, None] + jnp.arange(block, dtype=jnp.int32)
  return row_CB, row_CB < stop_C[:, None]


def _scores(form: Form, tables, plan: Plan, q_CBHD, k_CKHD, row_CB, inside_CB, key_CK):
  """(score_CHBK, seen_C1BK, buckets of every bias)."""
  score = jnp.einsum("cbhd,ckhd->chbk", q_CBHD, k_CKHD)
  score *= form.scale
  found = []
  for buckets, table_HN, x_T, x_E in zip(
    form.biases, tables, plan.q_coordinates, plan.kv_coordinates
  ):
    x_CB, x_CK = x_T.at[row_CB].get(mode="clip"), x_E.at[key_CK].get(mode="clip")
    bucket_CBK = buckets(x_CB[:, :, None] - x_CK[:, None, :], table_HN.shape[1])
    score += jnp.moveaxis(table_HN.astype(score.dtype)[:, bucket_CBK], 0, 1)
    found.append(bucket_CBK)
  lo_CB, hi_CB = (_take(x, row_CB, inside_CB) for x in (plan.lo_T, plan.hi_T))
  seen = (key_CK[:, None, :] >= lo_CB[..., None]) & (key_CK[:, None, :] < hi_CB[..., None])
  return score, seen[:, None], tuple(found)


def _over_tiles(cut: tiles.Tiles, body, carry):
  """carry = body(the next C tiles, carry), for as long as they have anything to visit."""
  number = len(cut.start_N)
  chunks = -(-number // AT_A_TIME)
  room = chunks * AT_A_TIME - number
  cut = tiles.Tiles(*(jnp.pad(x, (0, room)).reshape(chunks, AT_A_TIME) for x in cut))
  used = jnp.sum(jnp.any(cut.first_N < cut.last_N, axis=1))  # The costliest come first.
  step = lambda i, carry: body(tiles.Tiles(*(x[i] for x in cut)), carry)
  return jax.lax.fori_loop(0, used, step, carry)


def _over_other(some: tiles.Tiles, block: int, body, carry):
  """carry = body(row_CK, inside_CK, carry) for tile after tile of what `some` have to visit."""
  trips = jnp.max(-(-(some.last_N - some.first_N) // block))
  step = lambda j, carry: body(*_rows(some.first_N + j * block, some.last_N, block), carry)
  return jax.lax.fori_loop(0, trips, step, carry)


def _turned(x_CHBK: jax.Array) -> jax.Array:
  """(C, H, K, B), on a CPU written out: XLA then multiplies it faster (a small GEM's step with 200
  events an example, on one core: .42 instead of .46 s).
  """
  x_CHKB = jnp.swapaxes(x_CHBK, 2, 3)
  written = jax.lax.optimization_barrier
  return jax.lax.platform_dependent(x_CHKB, cpu=written, default=lambda x: x)


def forward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan) -> Saved:
  """The output, and of a softmax the logarithm of its denominators."""
  high = wide(q_THD)
  heads, width = q_THD.shape[1:]
  shape = (AT_A_TIME, heads, BLOCK_Q)

  def of_queries(some, carry):
    row_CB, inside_CB = _rows(some.start_N, some.stop_N, BLOCK_Q)
    q_CBHD = _take(q_THD, row_CB, inside_CB)
    gain_CB = _take(plan.gain_T, row_CB, inside_CB).astype(high)

    def of_keys(key_CK, there_CK, sums):
      out_CHBD, top_CHB, sum_CHB = sums
      k_CKHD, v_CKHD = (_take(x, key_CK, there_CK) for x in (k_EHD, v_EHD))
      score, seen, _ = _scores(form, tables, plan, q_CBHD, k_CKHD, row_CB, inside_CB, key_CK)
      if form.softmax:
        score = jnp.where(seen, score, -jnp.inf)
        higher_CHB = jnp.maximum(top_CHB, jnp.max(score, axis=-1))
        anchor_CHB = jnp.where(jnp.isneginf(higher_CHB), 0, higher_CHB)
        weight = jnp.exp(score - anchor_CHB[..., None])
        shrink_CHB = jnp.exp(top_CHB - anchor_CHB)
        out_CHBD *= shrink_CHB[..., None]
        sum_CHB = sum_CHB * shrink_CHB + jnp.sum(weight, axis=-1)
        top_CHB = higher_CHB
      else:
        weight = POINTWISE[form.activation].value(score, jax.nn.sigmoid) * gain_CB[:, None, :, None]
        weight = jnp.where(seen, weight, 0)
      out_CHBD += jnp.einsum("chbk,ckhd->chbd", weight, v_CKHD)
      return out_CHBD, top_CHB, sum_CHB

    start = (
      jnp.zeros((*shape, width), high),
      jnp.full(shape, -jnp.inf, high),
      jnp.zeros(shape, high),
    )
    out_CHBD, top_CHB, sum_CHB = _over_other(some, BLOCK_K, of_keys, start)
    out_THD, log_TH = carry
    row_CB = jnp.where(inside_CB, row_CB, len(q_THD))
    if form.softmax:
      sum_CHB = jnp.where(sum_CHB > 0, sum_CHB, 1)
      out_CHBD /= sum_CHB[..., None]
      log_CHB = jnp.where(jnp.isneginf(top_CHB), 0, top_CHB) + jnp.log(sum_CHB)
      log_TH = log_TH.at[row_CB].set(jnp.swapaxes(log_CHB, 1, 2), mode="drop")
    out_CBHD = jnp.swapaxes(out_CHBD, 1, 2).astype(q_THD.dtype)
    return out_THD.at[row_CB].set(out_CBHD, mode="drop"), log_TH

  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, BLOCK_Q)
  logs = q_THD.shape[:2] if form.softmax else (0, 0)
  return Saved(*_over_tiles(cut, of_queries, (jnp.zeros_like(q_THD), jnp.zeros(logs, high))))


def backward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, saved: Saved, g_THD) -> Gradients:
  """Queries and tables in one sweep, keys and values in another: no sum is shared by two tiles."""
  high = wide(q_THD)
  heads, width = q_THD.shape[1:]
  delta_TH = jnp.einsum("thd,thd->th", saved.out_THD.astype(high), g_THD.astype(high))

  def slopes(q_CBHD, k_CKHD, v_CKHD, row_CB, inside_CB, key_CK):
    """(weight, d loss / d score, buckets, gradient of the output's rows) of one pair of tiles."""
    score, seen, found = _scores(form, tables, plan, q_CBHD, k_CKHD, row_CB, inside_CB, key_CK)
    g_CBHD = _take(g_THD, row_CB, inside_CB)
    pull = jnp.einsum("cbhd,ckhd->chbk", g_CBHD, v_CKHD)
    if form.softmax:
      log, delta = (
        jnp.swapaxes(_take(x, row_CB, inside_CB), 1, 2)[..., None] for x in (saved.log_TH, delta_TH)
      )
      weight = jnp.where(seen, jnp.exp(jnp.where(seen, score, 0) - log), 0)
      slope = jnp.where(seen, weight * (pull - delta), 0)
    else:
      f = POINTWISE[form.activation]
      gain = _take(plan.gain_T, row_CB, inside_CB).astype(high)[:, None, :, None]
      weight = jnp.where(seen, f.value(score, jax.nn.sigmoid) * gain, 0)
      slope = jnp.where(seen, f.slope(score, jax.nn.sigmoid) * gain * pull, 0)
    return weight, slope, found, g_CBHD

  def of_queries(some, carry):
    row_CB, inside_CB = _rows(some.start_N, some.stop_N, BLOCK_Q)
    q_CBHD = _take(q_THD, row_CB, inside_CB)

    def of_keys(key_CK, there_CK, sums):
      dq_CHBD, dtables = sums
      k_CKHD, v_CKHD = (_take(x, key_CK, there_CK) for x in (k_EHD, v_EHD))
      _, slope, found, _ = slopes(q_CBHD, k_CKHD, v_CKHD, row_CB, inside_CB, key_CK)
      dtables = tuple(
        d + jnp.einsum("chbk,cbkn->hn", slope, jax.nn.one_hot(bucket, d.shape[1], dtype=high))
        for d, bucket in zip(dtables, found)
      )
      dq = jnp.einsum("chbk,ckhd->chbd", slope, k_CKHD)
      return dq_CHBD + dq, dtables

    dq_THD, dtables = carry
    start = jnp.zeros((AT_A_TIME, heads, BLOCK_Q, width), high), dtables
    dq_CHBD, dtables = _over_other(some, BLOCK_K, of_keys, start)
    dq_CBHD = (jnp.swapaxes(dq_CHBD, 1, 2) * form.scale).astype(q_THD.dtype)
    row_CB = jnp.where(inside_CB, row_CB, len(q_THD))
    return dq_THD.at[row_CB].set(dq_CBHD, mode="drop"), dtables

  def of_keys(some, carry):
    key_CK, there_CK = _rows(some.start_N, some.stop_N, BLOCK_K)
    k_CKHD, v_CKHD = (_take(x, key_CK, there_CK) for x in (k_EHD, v_EHD))

    def of_queries(row_CB, inside_CB, sums):
      dk_CHKD, dv_CHKD = sums
      q_CBHD = _take(q_THD, row_CB, inside_CB)
      weight, slope, _, g_CBHD = slopes(q_CBHD, k_CKHD, v_CKHD, row_CB, inside_CB, key_CK)
      total = lambda x, y: jnp.einsum("chkb,cbhd->chkd", _turned(x), y)
      dk = total(slope, q_CBHD)
      return dk_CHKD + dk, dv_CHKD + total(weight, g_CBHD)

    zero = jnp.zeros((AT_A_TIME, heads, BLOCK_K, width), high)
    dk_CHKD, dv_CHKD = _over_other(some, BLOCK_Q, of_queries, (zero, zero))
    key_CK = jnp.where(there_CK, key_CK, len(k_EHD))
    write = lambda x_EHD, dx_CHKD: x_EHD.at[key_CK].set(
      jnp.swapaxes(dx_CHKD, 1, 2).astype(x_EHD.dtype), mode="drop"
    )
    dk_EHD, dv_EHD = carry
    return write(dk_EHD, dk_CHKD * form.scale), write(dv_EHD, dv_CHKD)

  zeros = tuple(jnp.zeros(table_HN.shape, high) for table_HN in tables)
  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, BLOCK_Q)
  dq_THD, dtables = _over_tiles(cut, of_queries, (jnp.zeros_like(q_THD), zeros))
  cut = tiles.key_tiles(plan.kv_offsets_S1, plan.lo_T, plan.hi_T, len(k_EHD), BLOCK_K)
  start = jnp.zeros_like(k_EHD), jnp.zeros_like(v_EHD)
  return Gradients(dq_THD, *_over_tiles(cut, of_keys, start), dtables)
