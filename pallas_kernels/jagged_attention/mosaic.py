"""Forward pass in the Mosaic GPU lowering for Hopper (sm_90a): wgmma, TMA, warps in roles.

A block of threads has one tile of 128 queries and one head. Its third group of warps does nothing
but copy tiles of keys and values into rings in shared memory; the other two have 64 queries each
and take them from there, so that one multiplies while the other takes exponentials
(FlashAttention-3, arXiv 2407.08608, 3.1). Of every place of a ring a barrier says that it is
filled, another that it is free again.

Offsets of segments are multiples of nothing, and three things follow:
- Mosaic has TMA read what wgmma takes from shared memory in tiles of 8 rows, and of a tile that
  does not start at a multiple of 8 rows it would read only the rest. So keys are read from such a
  multiple on, and masks leave out those before the first.
- Queries are read as rows, from any on, and brought into tiles by way of registers.
- A tile's last queries are followed by those of another, and TMA writes whole boxes. So its own
  are written as boxes of 64, 32, ..., 1 rows: one for each half of a full tile.

The interpreter runs all of it but the products and the layouts of registers (warpgroup.py). So
barriers, addresses, masks, sums and stores are tested by numbers everywhere; products and layouts
where there is an H100 (WORKSPACE.md, Known limits). JAX refuses causal masks in its own attention
on CUDA 12.8.0 to 12.9.0, whose ptxas miscompiles them, and ours are of the same kind. Mosaic takes
the ptxas that it finds first: that of the wheels is 12.9.86, of CUDA 12.9.1.

Letters: B queries of a group, G groups, K keys of a tile, P places of a ring, T queries, E keys, H
heads, D width, C columns of the output that are summed at once, N tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jagged_attention import edges, mosaic_rows, tiles
from pallas_kernels.jagged_attention.activation import POINTWISE, sigmoid_by
from pallas_kernels.jagged_attention.form import Form, Plan, Saved
from pallas_kernels.jagged_attention.mosaic_rows import GROUPS, ROWS, TILED, across
from pallas_kernels.jagged_attention.warpgroup import Compiled, Interpreted

WIDTHS = (64, 128, 256)
KERNEL = "jagged_attention_forward_mosaic"


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
  """Keys of a tile, places of the ring, columns of the output that are multiplied at once."""

  keys: int
  places: int
  columns: int


def launch(width: int) -> Launch:
  """What fits into 227 KB of shared memory and 240 registers (python -m pallas_kernels.report)."""
  return {64: Launch(128, 3, 64), 128: Launch(128, 2, 128), 256: Launch(64, 2, 128)}[width]


def refusal(q_THD: jax.Array, k_EHD: jax.Array, tables: tuple[jax.Array, ...]) -> str | None:
  """Why the kernel cannot do it; None where it can."""
  if jax.config.jax_enable_x64:
    return "it counts in 32 bits, and jax_enable_x64 makes counters of 64"
  if q_THD.dtype not in (jnp.bfloat16, jnp.float16):
    return f"its dtypes are bfloat16 and float16, not {q_THD.dtype}"
  if q_THD.shape[2] not in WIDTHS:
    return f"a head's width must be one of {WIDTHS}, is {q_THD.shape[2]}"
  if tables:
    return f"it has no biases, and there are {len(tables)}"
  if not len(q_THD) or not len(k_EHD):
    return f"there are {len(q_THD)} queries and {len(k_EHD)} keys"
  return None


def _softmax(scale: float, score, top_B, sum_B):
  """(weights, shrinkage of sums so far, top, sum); top in powers of two, as the hardware has."""
  factor = abs(scale) * math.log2(math.e) or 1.0
  higher_B = jnp.maximum(top_B, jnp.max(score, axis=1) * factor)
  anchor_B = jnp.where(higher_B == -jnp.inf, 0.0, higher_B)
  weight = jnp.exp2(score * factor - across(anchor_B, score))
  shrink_B = jnp.exp2(top_B - anchor_B)
  return weight, shrink_B, higher_B, sum_B * shrink_B + jnp.sum(weight, axis=1)


def _kernel(form: Form, shape: Launch, heads: int, on, *refs):
  tile_refs, (limits_ref, gain_ref, q_ref, k_ref, v_ref), refs = refs[:6], refs[6:11], refs[11:]
  (inside_ref, edges_ref), refs = refs[:2], refs[2:]
  out_ref, log_ref, *scratch = refs if form.softmax else (refs[0], None, *refs[1:])
  limits_smem, row_smem, q_smem, k_smem, v_smem, out_smem, *barriers = scratch
  ready, loaded, k_filled, v_filled, k_freed, v_freed = barriers
  group, tile, head, visit, steps = mosaic_rows.work(tile_refs, heads, shape.keys)
  start, stop, first, _, inner_first, inner_last = visit
  alive = start < stop

  @pl.when(alive & (group == GROUPS))
  def _copies():
    plgpu.set_max_registers(mosaic_rows.REGISTERS_OF_COPIES, action="decrease")
    inside = [inside_ref[i] for i in range(2)]
    plgpu.copy_gmem_to_smem(limits_ref.at[tile], limits_smem, ready)
    if not form.softmax:
      plgpu.copy_gmem_to_smem(gain_ref.at[tile], row_smem, ready)

    @pl.loop(0, steps)
    def _step(j):
      place = lax.rem(j, shape.places)
      key = first + j * shape.keys

      def fill(ref, row, ring, filled_P):
        rows = pl.ds(pl.multiple_of(row, edges.ALIGNED), shape.keys)
        plgpu.copy_gmem_to_smem(ref.at[rows, head], ring.at[place], filled_P.at[place])

      def freed(barrier_P):
        pl.when(j >= shape.places)(lambda: plgpu.barrier_wait(barrier_P.at[place]))

      freed(k_freed)
      fill(k_ref, key, k_smem, k_filled)
      freed(v_freed)
      edge = edges.start(*inside, key, shape.keys)
      pl.when(edge < 0)(lambda: fill(v_ref, key, v_smem, v_filled))
      pl.when(edge >= 0)(lambda: fill(edges_ref, edge, v_smem, v_filled))

  @pl.when(alive & (group < GROUPS))
  def _computes():
    plgpu.set_max_registers(mosaic_rows.REGISTERS, action="increase")
    parts = mosaic_rows.parts(q_smem.shape[-1], shape.columns)
    first_row = start + group * ROWS
    mosaic_rows.load(
      on, q_ref, first_row, head, out_smem.at[group], loaded.at[group], q_smem.at[group]
    )
    plgpu.barrier_wait(ready)

    def step(j, sums):
      outs_BC, carry = sums
      place = lax.rem(j, shape.places)
      key = first + j * shape.keys
      # A place is freed only if it is to be filled again, so that none is freed unheard.
      again = j + shape.places < steps
      plgpu.barrier_wait(k_filled.at[place])
      score = on.scores(q_smem.at[group], k_smem.at[place])
      pl.when(again)(lambda: plgpu.barrier_arrive(k_freed.at[place]))

      def masked(x, fill):
        def mask(x):
          lo_B, hi_B = (on.row_terms(limits_smem.at[group, i]) for i in range(2))
          column = on.numbers(x.shape, 1)
          seen = column >= across(lo_B - key, x)
          seen &= column < across(hi_B - key, x)
          return jnp.where(seen, x, fill)

        inside = (key >= inner_first) & (key + shape.keys <= inner_last)
        return lax.cond(inside, lambda x: x, mask, x)

      if form.softmax:
        score = masked(score, -jnp.inf)
        weight, shrink_B, *carry = _softmax(form.scale, score, *carry)
        outs_BC = [x * across(shrink_B, x) for x in outs_BC]
      else:
        gain_B = on.row_terms(row_smem.at[group])
        weight = POINTWISE[form.activation].value(score * form.scale, sigmoid_by(jnp.tanh))
        weight *= across(gain_B, score)
        weight = masked(weight, 0.0)
      weight = weight.astype(q_smem.dtype)
      plgpu.barrier_wait(v_filled.at[place])
      values = v_smem.at[place]
      outs_BC = [on.add_product(x, weight, values.at[:, p]) for x, p in zip(outs_BC, parts)]
      pl.when(again)(lambda: plgpu.barrier_arrive(v_freed.at[place]))
      return outs_BC, carry

    zeros = [on.full((ROWS, shape.columns), 0.0) for _ in parts]
    carry = [on.full((ROWS,), -jnp.inf), on.full((ROWS,), 0.0)] if form.softmax else []
    outs_BC, carry = lax.fori_loop(0, steps, step, (zeros, carry))
    if form.softmax:
      top_B, sum_B = carry
      sum_B = jnp.where(sum_B > 0, sum_B, 1.0)
      outs_BC = [x * across(1.0 / sum_B, x) for x in outs_BC]
      top_B = jnp.where(top_B == -jnp.inf, 0.0, top_B)
      row_smem.at[group][...] = top_B * math.log(2) + jnp.log(sum_B)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(row_smem.at[group], log_ref.at[tile, head, group])
    for part, x_BC in zip(parts, outs_BC):
      mosaic_rows.store(x_BC, out_smem.at[group], out_ref, head, part, first_row, stop)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def forward(form: Form, q_THD, k_EHD, v_EHD, tables, plan: Plan, *, interpret: bool) -> Saved:
  """The output, and of a softmax the logarithm of its denominators; see `refusal`."""
  del tables  # Refused.
  count, heads, width = q_THD.shape
  shape = launch(width)
  if form.softmax and form.scale <= 0:
    q_THD = q_THD * jnp.sign(form.scale).astype(q_THD.dtype)  # The kernel has |scale|, or 1 for 0.
  inside_2, edges_RHD = edges.rows(v_EHD, plan.kv_offsets_S1, shape.keys)
  k_EHD, v_EHD = (mosaic_rows.padded(x) for x in (k_EHD, v_EHD))
  cut = tiles.query_tiles(plan.q_offsets_S1, plan.lo_T, plan.hi_T, GROUPS * ROWS)
  row_NGB = mosaic_rows.own(cut, count)
  number = len(row_NGB)
  lo_NGB, hi_NGB, gain_NGB = (
    x_T.at[row_NGB].get(mode="fill", fill_value=0) for x_T in (plan.lo_T, plan.hi_T, plan.gain_T)
  )
  limits_NG2B = jnp.stack([lo_NGB, hi_NGB], axis=2)

  outputs = [jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype)]
  if form.softmax:
    outputs.append(jax.ShapeDtypeStruct((number, heads, GROUPS, ROWS), jnp.float32))
  found = plgpu.kernel(
    functools.partial(_kernel, form, shape, heads, Interpreted if interpret else Compiled),
    out_type=outputs,
    scratch_types=_scratch(form, shape, width, q_THD.dtype),
    grid=(number * heads,),
    grid_names=("program",),
    num_threads=GROUPS + 1,
    thread_name="group",
    kernel_name=KERNEL,
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=mosaic_rows.interpreter() if interpret else None,
  )(*mosaic_rows.aligned(cut), limits_NG2B, gain_NGB, q_THD, k_EHD, v_EHD, inside_2, edges_RHD)
  if not form.softmax:
    return Saved(found[0], jnp.zeros((0, 0), jnp.float32))
  log_NGBH = jnp.moveaxis(found[1], 1, 3)
  log_TH = jnp.zeros((count, heads), jnp.float32)
  return Saved(found[0], log_TH.at[row_NGB].set(log_NGBH, mode="drop"))


def _scratch(form: Form, shape: Launch, width: int, dtype) -> list:
  ring = plgpu.SMEM((shape.places, shape.keys, width), dtype, transforms=TILED)
  filled = plgpu.Barrier(num_barriers=shape.places)
  freed = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=shape.places)
  return [
    plgpu.SMEM((GROUPS, 2, ROWS), jnp.int32),
    plgpu.SMEM((GROUPS, ROWS), jnp.float32),  # Gains, or logarithms.
    plgpu.SMEM((GROUPS, ROWS, width), dtype, transforms=TILED),
    ring,
    ring,
    plgpu.SMEM((GROUPS, ROWS, shape.columns), dtype),
    plgpu.Barrier(num_arrivals=1 if form.softmax else 2),  # Limits, and gains.
    plgpu.Barrier(num_barriers=GROUPS),  # Queries.
    filled,
    filled,
    freed,
    freed,
  ]
