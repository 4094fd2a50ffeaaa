"""From a batch to ids of the stacks, and from looked-up rows to the units a model reads.

Between the two lies the lookup; the gradient is taken with respect to the rows, never to a table.
Letters: B examples, M ids of a stack, W width of a stack, N units, D width of a unit, E events.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.embedding.tables import TableLayout
from gemjax.features import Batch, Jagged

Rows = dict[int, jax.Array]  # Stack width -> (M, W)


def stack_ids(layout: TableLayout, batch: Batch) -> dict[int, jax.Array]:
  """Width -> (M,) int32 rows of that stack: sparse features first, example by example, then the
  events of each sequence feature; padding reads row R, one beyond the last.
  """
  ids = {}
  for width, rows in layout.rows:
    sparse = [p for p in layout.sparse if p.width == width]
    columns = jnp.array([p.column for p in sparse], jnp.int32)
    offsets_S = jnp.array([p.offset for p in sparse], jnp.int32)
    parts = [(batch.ids_BS[:, columns] + offsets_S).reshape(-1)]
    for place in (p for p in layout.sequence if p.width == width):
      jagged = batch.sequences[place.feature]
      used_E = jnp.arange(len(jagged.values_E)) < jnp.sum(jagged.lengths_B)
      parts.append(jnp.where(used_E, jagged.values_E + place.offset, rows))
    ids[width] = jnp.concatenate(parts)
  return ids


def assemble(layout: TableLayout, rows: Rows, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(units_BND, small_BSW): looked-up rows as units, and the rows of small tables side by side.

  A row of u units is cut into u units of width d. A sequence feature gives as many units as its
  table, the mean over its events; an example without events gets zeros.
  """
  batch_size = len(batch.weight_B)
  units, small = [], []
  for width, rows_MW in rows.items():
    sparse = [p for p in layout.sparse if p.width == width]
    end = batch_size * len(sparse)
    looked_BSW = rearrange(rows_MW[:end], "(b s) w -> b s w", b=batch_size)
    if sparse and sparse[0].small:
      small.append(looked_BSW)
      continue
    units.append(rearrange(looked_BSW, "b s (u d) -> b (s u) d", d=layout.dim))
    for place in (p for p in layout.sequence if p.width == width):
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
  segment_E = jnp.searchsorted(ends_B, jnp.arange(len(rows_EW)), side="right")
  sum_BW = jax.ops.segment_sum(rows_EW, segment_E, batch_size + 1, indices_are_sorted=True)[:-1]
  return sum_BW / jnp.maximum(jagged.lengths_B, 1)[:, None]
