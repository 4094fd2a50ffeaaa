"""From a batch to positions in the stacks, and from looked-up rows to the units a model reads.

Between the two lies the lookup; the gradient is taken with respect to the rows, never to a table.
Letters: B examples, S sparse features, E events, M look-ups of a stack, W its width, N units, D
width of a unit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.embedding.duplicates import sum_runs
from gemjax.embedding.tables import StackLayout, TableLayout
from gemjax.features import Batch, Jagged

Rows = dict[str, jax.Array]  # Stack name -> (M, W)


def positions(layout: TableLayout, batch: Batch) -> dict[str, jax.Array]:
  """Stack name -> (M,) uint64 positions: sparse features first, example by example, then the
  events of each sequence feature. Padding stands at `rows`, one beyond the last.
  """
  out = {}
  with jax.enable_x64(True):  # A stack may have more than 2^32 rows.
    for stack in layout.stacks:
      sparse = [p for p in layout.sparse if p.stack == stack.name]
      columns = jnp.array([p.column for p in sparse], jnp.int32)
      offset_S = jnp.array([p.offset for p in sparse], jnp.uint64)
      parts = [_permuted(_row(batch.ids_BS[:, columns]) + offset_S, stack).reshape(-1)]
      for place in (p for p in layout.sequence if p.stack == stack.name):
        jagged = batch.sequences[place.feature]
        used_E = jnp.arange(len(jagged.values_E)) < jnp.sum(jagged.lengths_B)
        position_E = _permuted(_row(jagged.values_E) + jnp.uint64(place.offset), stack)
        parts.append(jnp.where(used_E, position_E, jnp.uint64(stack.rows)))
      out[stack.name] = jnp.concatenate(parts)
  return out


def _row(ids: jax.Array) -> jax.Array:
  """uint64 rows of the feature's own table; ids are int32, or pairs of words, the low one first."""
  if ids.dtype == jnp.int32:
    return ids.astype(jnp.uint64)
  return ids[..., 0].astype(jnp.uint64) | (ids[..., 1].astype(jnp.uint64) << 32)


def _permuted(row: jax.Array, stack: StackLayout) -> jax.Array:
  if stack.multiplier == 1:
    return row
  return row * jnp.uint64(stack.multiplier) % jnp.uint64(stack.rows)


def assemble(layout: TableLayout, rows: Rows, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(units_BND, small_BSW): looked-up rows as units, and the rows of small tables side by side.

  A row of u units is cut into u units of width d. A sequence feature gives as many units as its
  table, the mean over its events; an example without events gets zeros.
  """
  batch_size = len(batch.weight_B)
  units, small = [], []
  for stack in layout.stacks:
    sparse = [p for p in layout.sparse if p.stack == stack.name]
    rows_MW, end = rows[stack.name], batch_size * len(sparse)
    looked_BSW = rearrange(rows_MW[:end], "(b s) w -> b s w", b=batch_size)
    if stack.small:
      small.append(looked_BSW)
      continue
    units.append(rearrange(looked_BSW, "b s (u d) -> b (s u) d", d=layout.dim))
    for place in (p for p in layout.sequence if p.stack == stack.name):
      jagged = batch.sequences[place.feature]
      start, end = end, end + len(jagged.values_E)
      pooled_BW = mean_pool(rows_MW[start:end], jagged)
      units.append(rearrange(pooled_BW, "b (u d) -> b u d", d=layout.dim))
  units_BND = jnp.concatenate(units, 1) if units else jnp.zeros((batch_size, 0, layout.dim))
  return units_BND, jnp.concatenate(small, 1) if small else jnp.zeros((batch_size, 0, 0))


def mean_pool(rows_EW: jax.Array, jagged: Jagged) -> jax.Array:
  """(B, W): the mean of each example's events, zeros where it has none."""
  batch_size = len(jagged.lengths_B)
  # Events beyond the last example fall into segment B, which is cut off.
  ends_B = jnp.cumsum(jagged.lengths_B)
  segment_E = jnp.searchsorted(ends_B, jnp.arange(len(rows_EW)), side="right").astype(jnp.int32)
  sum_BW = sum_runs(rows_EW, segment_E, batch_size + 1)[:-1]
  return sum_BW / jnp.maximum(jagged.lengths_B, 1)[:, None]
