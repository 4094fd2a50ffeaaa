"""Backward pass in the Mosaic GPU lowering for Hopper: roles, rings and tiles as in mosaic.py.

Two kernels, so that nothing is added to memory that others add to, and results repeat to the bit.
Both have one form, of rows a, b that a group owns and rows x, y that come by in a ring:

    score = a x^T     pull = b y^T     weight = f(score)     slope = f'(score) pull

    queries     a = q, b = g; x = k, y = v     dq = sum slope x
    keys        a = k, b = v; x = q, y = g     dk = sum slope x, dv = sum weight y

(FlashAttention-2, arXiv 2307.08691, algorithm 2). Limits of what a query sees and terms of its
softmax, the logarithm and delta, lie with the rows of the first and the columns of the second,
where they come by with it.

Letters: B owned rows of a group, K rows of a place in the ring, P places, G groups, T queries, E
keys, H heads, D width, N tiles.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jagged_attention import edges, mosaic_rows, tiles
from pallas_kernels.jagged_attention.activation import POINTWISE, sigmoid_by
from pallas_kernels.jagged_attention.form import Form, Gradients, Plan, Saved
from pallas_kernels.jagged_attention.mosaic_rows import GROUPS, ROWS, TILED, across
from pallas_kernels.jagged_attention.triton_rows import LOG2_E
from pallas_kernels.jagged_attention.warpgroup import Compiled, Interpreted

WIDTHS = (64, 128)  # The sums of a key's gradients take a width's registers twice.
KERNELS = "jagged_attention_backward_queries_mosaic", "jagged_attention_backward_keys_mosaic"


def serves(form: Form, q_THD: jax.Array) -> bool:
  """Whether these kernels have the gradients, of what the forward pass does not refuse.

  Gains scale g before it is rounded, for which float16 has too few exponents.
  """
  return q_THD.shape[2] in WIDTHS and (form.softmax or q_THD.dtype == jnp.bfloat16)


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
  """Rows of a place in the ring, and places."""

  rows: int
  places: int


def launch(width: int, keyed: bool) -> Launch:
  """What fits into 227 KB of shared memory and 240 registers (python -m pallas_kernels.report)."""
  if keyed:
    return Launch(64, 4 if width == 64 else 3)
  return Launch(128, 3 if width == 64 else 2)


def _weights(form: Form, score, factors, terms, along):
  """(weight, d weight / d scaled score); of a softmax both are the weight."""
  if form.softmax:
    weight = jnp.exp2(score * (form.scale * LOG2_E) - along(terms[0]()))
    return weight, weight
  scale, gain = factors
  of, score, sigmoid = POINTWISE[form.activation], score * scale, sigmoid_by(jnp.tanh)
  return of.value(score, sigmoid) * gain, of.slope(score, sigmoid) * gain


def _kernel(form: Form, shape: Launch, heads: int, keyed: bool, on, *refs):
  tile_refs, (inside_ref, factor_ref), refs = refs[:6], refs[6:8], refs[8:]
  (a_ref, b_ref, *streamed), edge_refs, refs = refs[:4], refs[4:6], refs[6:]
  count = 1 + form.softmax  # Limits, and terms of a softmax.
  (limits_ref, *terms_refs), refs = refs[:count], refs[count:]
  out_refs, refs = refs[: 1 + keyed], refs[1 + keyed :]
  (limits_smem, *terms_smem), refs = refs[:count], refs[count:]
  a_smem, b_smem, x_smem, y_smem, stage, ready, loaded, filled, freed = refs
  group, tile, head, visit, steps = mosaic_rows.work(tile_refs, heads, shape.rows)
  start, stop, first, _, inner_first, inner_last = visit
  alive = start < stop

  @pl.when(alive & (group == GROUPS))
  def _copies():
    plgpu.set_max_registers(mosaic_rows.REGISTERS_OF_COPIES, action="decrease")
    inside = [inside_ref[i] for i in range(2)]
    if not keyed:
      plgpu.copy_gmem_to_smem(limits_ref.at[tile], limits_smem, ready)
      for ref, smem in zip(terms_refs, terms_smem):
        plgpu.copy_gmem_to_smem(ref.at[tile, head], smem, ready)

    @pl.loop(0, steps)
    def _step(j):
      place = lax.rem(j, shape.places)
      row = pl.multiple_of(first + j * shape.rows, edges.ALIGNED)
      edge = edges.start(*inside, row, shape.rows)

      def fill(ref, row, ring):
        rows = pl.ds(pl.multiple_of(row, edges.ALIGNED), shape.rows)
        plgpu.copy_gmem_to_smem(ref.at[rows, head], ring.at[place], filled.at[place])

      pl.when(j >= shape.places)(lambda: plgpu.barrier_wait(freed.at[place]))
      for ref, edge_ref, ring in zip(streamed, edge_refs, (x_smem, y_smem)):
        pl.when(edge < 0)(functools.partial(fill, ref, row, ring))
        pl.when(edge >= 0)(functools.partial(fill, edge_ref, edge, ring))
      if keyed:
        columns = pl.ds(row, shape.rows)
        sources = [limits_ref.at[:, columns], *(ref.at[head, :, columns] for ref in terms_refs)]
        for source, ring in zip(sources, (limits_smem, *terms_smem)):
          plgpu.copy_gmem_to_smem(source, ring.at[place], filled.at[place])

  @pl.when(alive & (group < GROUPS))
  def _computes():
    plgpu.set_max_registers(mosaic_rows.REGISTERS, action="increase")
    first_row = start + group * ROWS
    for ref, tiled in ((a_ref, a_smem), (b_ref, b_smem)):
      mosaic_rows.load(on, ref, first_row, head, stage.at[group], loaded.at[group], tiled.at[group])
    if not keyed:
      plgpu.barrier_wait(ready)

    def step(j, sums):
      place = lax.rem(j, shape.places)
      row = first + j * shape.rows
      plgpu.barrier_wait(filled.at[place])
      x_KD, y_KD, b_BD = x_smem.at[place], y_smem.at[place], b_smem.at[group]
      score = on.scores(a_smem.at[group], x_KD)
      vector, lies = (on.column_terms, place) if keyed else (on.row_terms, group)
      along = functools.partial(across, like=score, axis=int(keyed))
      terms = [lambda i=i: vector(terms_smem[0].at[lies, i]) for i in range(2)]
      weight, slope = _weights(form, score, [factor_ref[i] for i in range(2)], terms, along)
      weight = weight.astype(x_smem.dtype)

      def masked(xs):
        # The other axis has keys where a row is a query, and the other way round.
        lo, hi = (along(vector(limits_smem.at[lies, i])) for i in range(2))
        key = on.numbers(score.shape, 0) + first_row if keyed else on.numbers(score.shape, 1) + row
        seen = (key >= lo) & (key < hi)
        return [jnp.where(seen, x, jnp.zeros_like(x)) for x in xs]

      whole = (row >= inner_first) & (row + shape.rows <= inner_last)
      weight, slope = lax.cond(whole, lambda xs: list(xs), masked, (weight, slope))
      if keyed:
        dx_BD, dy_BD = sums
        dy_BD, pull = on.add_product_and_scores(dy_BD, weight, y_KD, b_BD)
      else:
        (dx_BD,) = sums
        pull = on.scores(b_BD, y_KD)
      if form.softmax:
        pull -= along(terms[1]())
      dx_BD = on.add_product(dx_BD, (slope * pull).astype(x_smem.dtype), x_KD)
      again = j + shape.places < steps  # As in mosaic.py.
      pl.when(again)(lambda: plgpu.barrier_arrive(freed.at[place]))
      return (dx_BD, dy_BD) if keyed else (dx_BD,)

    zero = on.full((ROWS, a_smem.shape[-1]), 0.0)
    sums = lax.fori_loop(0, steps, step, (zero,) * len(out_refs))
    whole = slice(0, a_smem.shape[-1])
    for out_ref, sum_BD, scale in zip(out_refs, sums, (form.scale, 1.0)):
      mosaic_rows.store(sum_BD * scale, stage.at[group], out_ref, head, whole, first_row, stop)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def backward(
  form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, saved: Saved, g_THD, *, interpret: bool
) -> Gradients:
  """Gradients of queries by one kernel, of keys and values by another; see `mosaic.refusal`."""
  del tables  # Refused.
  limits_2T, terms = jnp.stack([plan.lo_T, plan.hi_T]), ()
  sees_T = plan.lo_T < plan.hi_T
  scale, gain = jnp.float32(form.scale), jnp.float32(1)
  if form.softmax:
    delta_HT = jnp.einsum("thd,thd->ht", saved.out_THD, g_THD, preferred_element_type=jnp.float32)
    terms = (jnp.stack([saved.log_TH.T * LOG2_E, jnp.where(sees_T, delta_HT, 0)], axis=1),)
  else:
    # A gain is its query's alone, so it may scale g and no tile has to read it. The greatest scales
    # weights instead, as in the forward pass, so that g is not rounded where all gains are equal.
    gain = jnp.max(jnp.where(sees_T, plan.gain_T, 0))
    share_T = plan.gain_T / jnp.where(gain > 0, gain, 1)
    g_THD = (g_THD * share_T[:, None, None]).astype(g_THD.dtype)
  # What sees nothing may be NaN, and no weight of 0 takes that away.
  g_THD = jnp.where(sees_T[:, None, None], g_THD, 0)
  of_queries = (q_THD, g_THD), plan.q_offsets_S1
  of_keys = (k_EHD, v_EHD), plan.kv_offsets_S1
  run = functools.partial(_call, form, jnp.stack([scale, gain]), interpret=interpret)

  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, GROUPS * ROWS)
  row_NGB = mosaic_rows.own(cut, len(q_THD))
  at_rows = lambda x: x.at[..., row_NGB].get(mode="fill", fill_value=0)
  limits_NG2B = jnp.moveaxis(at_rows(limits_2T), 0, 2)
  terms_NHG2B = [jnp.transpose(at_rows(x_H2T), (2, 0, 3, 1, 4)) for x_H2T in terms]
  (dq_THD,) = run(False, cut, (limits_NG2B, *terms_NHG2B), of_queries, of_keys)

  cut = tiles.key_tiles(plan.kv_offsets_S1, plan.lo_T, plan.hi_T, len(k_EHD), GROUPS * ROWS)
  # TMA reads rows of multiples of 16 bytes.
  room = -len(q_THD) % edges.ALIGNED
  streamed = [jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, room),)) for x in (limits_2T, *terms)]
  dk_EHD, dv_EHD = run(True, cut, streamed, of_keys, of_queries)
  return Gradients(dq_THD, dk_EHD, dv_EHD, ())


def _call(form: Form, factor_2, keyed, cut, vectors, owned, streamed, *, interpret: bool):
  (owned, _), (streamed, offsets_S1) = owned, streamed
  heads, width = owned[0].shape[1:]
  shape = launch(width, keyed)
  inside_2, *edge_rows = (
    edges.rows(streamed[0], offsets_S1, shape.rows)[0],
    *(edges.rows(x, offsets_S1, shape.rows)[1] for x in streamed),
  )
  return plgpu.kernel(
    functools.partial(_kernel, form, shape, heads, keyed, Interpreted if interpret else Compiled),
    out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in owned[: 1 + keyed]],
    scratch_types=_scratch(form, keyed, shape, width, owned[0].dtype),
    grid=(len(cut.start_N) * heads,),
    grid_names=("program",),
    num_threads=GROUPS + 1,
    thread_name="group",
    kernel_name=KERNELS[keyed],
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=mosaic_rows.interpreter() if interpret else None,
  )(
    *mosaic_rows.aligned(cut),
    inside_2,
    factor_2,
    *owned,
    *(mosaic_rows.padded(x) for x in streamed),
    *edge_rows,
    *vectors,
  )


def _scratch(form: Form, keyed: bool, shape: Launch, width: int, dtype) -> list:
  owned = plgpu.SMEM((GROUPS, ROWS, width), dtype, transforms=TILED)
  ring = plgpu.SMEM((shape.places, shape.rows, width), dtype, transforms=TILED)
  places, rows = (shape.places, shape.rows) if keyed else (GROUPS, ROWS)
  vectors = [jnp.int32, jnp.float32][: 1 + form.softmax]
  return [
    *(plgpu.SMEM((places, 2, rows), dtype) for dtype in vectors),
    owned,
    owned,
    ring,
    ring,
    plgpu.SMEM((GROUPS, ROWS, width), dtype),
    plgpu.Barrier(num_arrivals=len(vectors)),  # Of owned queries.
    plgpu.Barrier(num_barriers=GROUPS),
    plgpu.Barrier(num_arrivals=2 + keyed * len(vectors), num_barriers=shape.places),
    plgpu.Barrier(num_arrivals=GROUPS, num_barriers=shape.places),
  ]
