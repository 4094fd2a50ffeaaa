"""Plain JAX: the tiles that a GPU works on one by one, a few of equal cost at a time.

The costliest come first and the loops end where the work does, so time follows the pairs seen.
Letters: C tiles at a time, B queries and K keys of a tile, T queries, E keys, H heads, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.jagged_attention import tiles
from pallas_kernels.jagged_attention.activation import POINTWISE
from pallas_kernels.jagged_attention.form import Form, Gradients, Plan, Saved, wide

BLOCKS = 16, 64  # The least and the greatest rows of a tile.
AT_ONCE = 2**15  # Pairs of rows: enough that the loop costs nothing, few enough to stay in a cache.


def _block(rows: int, offsets_S1: jax.Array) -> int:
  """About the mean length of a segment: of longer tiles most pairs would be of two segments."""
  mean = -(-rows // (len(offsets_S1) - 1))
  return min(max(pl.next_power_of_2(mean), BLOCKS[0]), BLOCKS[1])


def _by_heads(x_THD: jax.Array) -> jax.Array:
  """(H, T, D): rows of a head lie side by side, so that tiles are multiplied as they lie."""
  return jnp.swapaxes(x_THD, 0, 1)


def _rows(start_C: jax.Array, stop_C: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  row_CB = start_C[:, None] + jnp.arange(block, dtype=jnp.int32)
  return row_CB, row_CB < stop_C[:, None]


def _take(x_T: jax.Array, row_CB: jax.Array, inside_CB: jax.Array) -> jax.Array:
  """Numbers of rows; 0 where not inside, whatever lies there."""
  return jnp.where(inside_CB, x_T.at[row_CB].get(mode="clip"), 0)


def _flat(x_HT: jax.Array, row_CB: jax.Array) -> jax.Array:
  """row_CHB: where rows of each head lie in (H T, ...)."""
  heads, count = x_HT.shape[:2]
  return row_CB[:, None] + count * jnp.arange(heads, dtype=jnp.int32)[:, None]


def _take_heads(x_HT: jax.Array, row_CB: jax.Array, inside_CB: jax.Array) -> jax.Array:
  """(C, H, B) or (C, H, B, D) of (H, T) or (H, T, D), in full precision; 0 where not inside."""
  inside_C1B = inside_CB[:, None]
  row_CHB = jnp.where(inside_C1B, _flat(x_HT, row_CB), 0)
  x = x_HT.reshape(-1, *x_HT.shape[2:]).at[row_CHB].get(mode="clip")
  x = x.astype(wide(x))  # XLA has no product of bf16 tiles with float32 sums on a CPU.
  return jnp.where(jnp.expand_dims(inside_C1B, range(3, x.ndim)), x, 0)


def _scores(form: Form, tables, plan: Plan, q_CHBD, k_CHKD, row_CB, inside_CB, key_CK, turned):
  """(score_CHBK, seen_C1BK, buckets of every bias), or with B and K turned."""
  score = jnp.einsum(f"chbd,chkd->ch{'kb' if turned else 'bk'}", q_CHBD, k_CHKD)
  score *= form.scale
  of_query, of_key = (
    functools.partial(jnp.expand_dims, axis=axis) for axis in ((1, 2) if turned else (2, 1))
  )
  found = []
  for buckets, table_HN, x_T, x_E in zip(
    form.biases, tables, plan.q_coordinates, plan.kv_coordinates
  ):
    x_CB, x_CK = x_T.at[row_CB].get(mode="clip"), x_E.at[key_CK].get(mode="clip")
    bucket = buckets(of_query(x_CB) - of_key(x_CK), table_HN.shape[1])
    score += jnp.moveaxis(table_HN.astype(score.dtype)[:, bucket], 0, 1)
    found.append(bucket)
  lo_CB, hi_CB = (_take(x, row_CB, inside_CB) for x in (plan.lo_T, plan.hi_T))
  seen = (of_key(key_CK) >= of_query(lo_CB)) & (of_key(key_CK) < of_query(hi_CB))
  return score, seen[:, None], tuple(found)


def _over_tiles(cut: tiles.Tiles, at_once: int, body, carry):
  """carry = body(the next C tiles, carry), for as long as they have anything to visit."""
  number = len(cut.start_N)
  C = min(at_once, number)
  chunks = -(-number // C)
  cut = tiles.Tiles(*(jnp.pad(x, (0, chunks * C - number)).reshape(chunks, C) for x in cut))
  used = jnp.sum(jnp.any(cut.first_N < cut.last_N, axis=1))  # The costliest come first.
  step = lambda i, carry: body(tiles.Tiles(*(x[i] for x in cut)), carry)
  return jax.lax.fori_loop(0, used, step, carry)


def _over_other(some: tiles.Tiles, block: int, body, carry):
  """carry = body(row_CK, inside_CK, carry) for tile after tile of what `some` have to visit."""
  trips = jnp.max(-(-(some.last_N - some.first_N) // block))
  step = lambda j, carry: body(*_rows(some.first_N + j * block, some.last_N, block), carry)
  return jax.lax.fori_loop(0, trips, step, carry)


def _write(x_HTD: jax.Array, row_CB, inside_CB, y_CHBD: jax.Array) -> jax.Array:
  """x with the rows y in their places, each of which is written once."""
  x_RD = x_HTD.reshape(-1, x_HTD.shape[2])
  row_CHB = jnp.where(inside_CB[:, None], _flat(x_HTD, row_CB), len(x_RD))
  x_RD = x_RD.at[row_CHB].set(y_CHBD.astype(x_HTD.dtype), mode="drop")
  return x_RD.reshape(x_HTD.shape)


def _add(x_HDT: jax.Array, start_C: jax.Array, y_CHDB: jax.Array) -> jax.Array:
  """x with the columns y added from `start` on, tile behind tile; x has room for the last."""

  def step(c, x_HDT):  # A loop: C copies of it were half of a model's program.
    at = jnp.int32(0), jnp.int32(0), start_C[c]
    y_HDB = y_CHDB[c] + jax.lax.dynamic_slice(x_HDT, at, y_CHDB.shape[1:])
    return jax.lax.dynamic_update_slice(x_HDT, y_HDB, at)

  return jax.lax.fori_loop(0, len(start_C), step, x_HDT)


def forward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan) -> Saved:
  """The output, and of a softmax the logarithm of its denominators."""
  high = wide(q_THD)
  heads, width = q_THD.shape[1:]
  Q, K = _block(len(q_THD), plan.q_offsets_S1), _block(len(k_EHD), plan.kv_offsets_S1)
  q_HTD, k_HED, v_HED = map(_by_heads, (q_THD, k_EHD, v_EHD))

  def of_queries(some, carry):
    row_CB, inside_CB = _rows(some.start_N, some.stop_N, Q)
    q_CHBD = _take_heads(q_HTD, row_CB, inside_CB)
    gain_CB = _take(plan.gain_T, row_CB, inside_CB).astype(high)

    def of_keys(key_CK, there_CK, sums):
      out_CHBD, top_CHB, sum_CHB = sums
      k_CHKD, v_CHKD = (_take_heads(x, key_CK, there_CK) for x in (k_HED, v_HED))
      args = form, tables, plan, q_CHBD, k_CHKD, row_CB, inside_CB, key_CK
      score, seen, _ = _scores(*args, turned=False)
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
      out_CHBD += jnp.einsum("chbk,chkd->chbd", weight, v_CHKD)
      return out_CHBD, top_CHB, sum_CHB

    shape = (len(row_CB), heads, Q)
    start = (
      jnp.zeros((*shape, width), high),
      jnp.full(shape, -jnp.inf, high),
      jnp.zeros(shape, high),
    )
    out_CHBD, top_CHB, sum_CHB = _over_other(some, K, of_keys, start)
    out_HTD, log_TH = carry
    if form.softmax:
      sum_CHB = jnp.where(sum_CHB > 0, sum_CHB, 1)
      out_CHBD /= sum_CHB[..., None]
      log_CHB = jnp.where(jnp.isneginf(top_CHB), 0, top_CHB) + jnp.log(sum_CHB)
      own_CB = jnp.where(inside_CB, row_CB, len(q_THD))
      log_TH = log_TH.at[own_CB].set(jnp.swapaxes(log_CHB, 1, 2), mode="drop")
    return _write(out_HTD, row_CB, inside_CB, out_CHBD), log_TH

  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, Q)
  logs = q_THD.shape[:2] if form.softmax else (0, 0)
  start = jnp.zeros_like(q_HTD), jnp.zeros(logs, high)
  out_HTD, log_TH = _over_tiles(cut, AT_ONCE // (Q * K), of_queries, start)
  return Saved(jnp.swapaxes(out_HTD, 0, 1), log_TH)


def backward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, saved: Saved, g_THD) -> Gradients:
  """Tiles of keys go over the queries that see them, to whose gradients they add in turn.

  In an order that depends on the lengths of all segments, and so do the last bits of these.
  """
  high = wide(q_THD)
  heads, width = q_THD.shape[1:]
  count = len(q_THD)
  Q, K = _block(count, plan.q_offsets_S1), _block(len(k_EHD), plan.kv_offsets_S1)
  delta_HT = jnp.einsum("thd,thd->ht", saved.out_THD.astype(high), g_THD.astype(high))
  q_HTD, k_HED, v_HED, g_HTD = map(_by_heads, (q_THD, k_EHD, v_EHD, g_THD))

  def of_keys(some, carry):
    key_CK, there_CK = _rows(some.start_N, some.stop_N, K)
    # A tile that nothing sees may hold anything, and no slope of 0 takes that away.
    seen_CK = there_CK & (some.first_N < some.last_N)[:, None]
    k_CHKD, v_CHKD = (_take_heads(x, key_CK, seen_CK) for x in (k_HED, v_HED))
    # XLA for CPUs multiplies as they lie what is summed over the first operand's last axis.
    k_CHDK = jax.lax.optimization_barrier(jnp.swapaxes(k_CHKD, 2, 3))

    def of_queries(row_CB, inside_CB, sums):
      dq_HDT, dk_CHKD, dv_CHKD, dtables = sums
      q_CHBD, g_CHBD = (_take_heads(x, row_CB, inside_CB) for x in (q_HTD, g_HTD))
      # All pairs lie (K, B), so that the sums of keys and values are products as they lie.
      args = form, tables, plan, q_CHBD, k_CHKD, row_CB, inside_CB, key_CK
      score, seen, found = _scores(*args, turned=True)
      seen &= seen_CK[:, None, :, None]
      pull = jnp.einsum("chbd,chkd->chkb", g_CHBD, v_CHKD)
      if form.softmax:
        log, delta = (
          _take_heads(x, row_CB, inside_CB)[:, :, None] for x in (saved.log_TH.T, delta_HT)
        )
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, score, 0) - log), 0)
        slope = jnp.where(seen, weight * (pull - delta), 0)
      else:
        f = POINTWISE[form.activation]
        gain = _take(plan.gain_T, row_CB, inside_CB).astype(high)[:, None, None]
        weight = jnp.where(seen, f.value(score, jax.nn.sigmoid) * gain, 0)
        slope = jnp.where(seen, f.slope(score, jax.nn.sigmoid) * gain * pull, 0)
      dtables = tuple(
        d + jnp.einsum("chkb,ckbn->hn", slope, jax.nn.one_hot(bucket, d.shape[1], dtype=high))
        for d, bucket in zip(dtables, found)
      )
      dq_CHDB = jnp.einsum("chdk,chkb->chdb", k_CHDK, slope)
      dq_CHDB = jnp.where(inside_CB[:, None, None], dq_CHDB, 0)  # A NaN of k stays with its own.
      dq_HDT = _add(dq_HDT, row_CB[:, 0], dq_CHDB)
      total = functools.partial(jnp.einsum, "chkb,chbd->chkd")
      return dq_HDT, dk_CHKD + total(slope, q_CHBD), dv_CHKD + total(weight, g_CHBD), dtables

    dq_HDT, dk_HED, dv_HED, dtables = carry
    zero = jnp.zeros((len(key_CK), heads, K, width), high)
    start = dq_HDT, zero, zero, dtables
    dq_HDT, dk_CHKD, dv_CHKD, dtables = _over_other(some, Q, of_queries, start)
    dk_HED = _write(dk_HED, key_CK, there_CK, dk_CHKD * form.scale)
    return dq_HDT, dk_HED, _write(dv_HED, key_CK, there_CK, dv_CHKD), dtables

  zeros = tuple(jnp.zeros(table_HN.shape, high) for table_HN in tables)
  cut = tiles.key_tiles(plan.kv_offsets_S1, plan.lo_T, plan.hi_T, len(k_EHD), K)
  dq_HDT = jnp.zeros((heads, width, count + Q), high)  # Room for a tile at the last row.
  start = dq_HDT, jnp.zeros_like(k_HED), jnp.zeros_like(v_HED), zeros
  dq_HDT, dk_HED, dv_HED, dtables = _over_tiles(cut, AT_ONCE // (Q * K), of_keys, start)
  dq_THD = jnp.moveaxis(dq_HDT[:, :, :count] * form.scale, 2, 0).astype(q_THD.dtype)
  return Gradients(dq_THD, *(jnp.swapaxes(x, 0, 1) for x in (dk_HED, dv_HED)), dtables)
