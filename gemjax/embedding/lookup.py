"""From a batch to positions in the stacks, and from looked-up rows to the units a model reads.

Between the two lies the lookup; the gradient is taken with respect to the rows, never to a table.
Letters: B examples, S sparse features, E events, M look-ups of a stack, W its width, N units of an
example, F units of an event, D width of a unit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.embedding.tables import StackLayout, TableLayout
from gemjax.features import Batch
from pallas_kernels import jagged_pool

Rows = dict[str, jax.Array]  # Stack name -> (M, W)


def positions(layout: TableLayout, batch: Batch) -> dict[str, jax.Array]:
  """Stack name -> (M,) uint64 positions: sparse features first, example by example, then the
  events of each sequence feature and of each column of a history. Padding stands at `rows`, one
  beyond the last.
  """
  out = {}
  with jax.enable_x64(True):  # A stack may have more than 2^32 rows.
    for stack in layout.stacks:
      sparse = [p for p in layout.sparse if p.stack == stack.name]
      columns = jnp.array([p.column for p in sparse], jnp.int32)
      offset_S = jnp.array([p.offset for p in sparse], jnp.uint64)
      parts = [_permuted(_row(batch.ids_BS[:, columns]) + offset_S, stack).reshape(-1)]
      for place, values_E, lengths_B in _jagged(layout, stack, batch):
        used_E = jnp.arange(len(values_E)) < jnp.sum(lengths_B)
        position_E = _permuted(_row(values_E) + jnp.uint64(place.offset), stack)
        parts.append(jnp.where(used_E, position_E, jnp.uint64(stack.rows)))
      out[stack.name] = jnp.concatenate(parts)
  return out


def _jagged(layout: TableLayout, stack: StackLayout, batch: Batch):
  """(place, values_E, lengths_B) of all that lies behind the sparse features in a stack."""
  for place in (p for p in layout.sequence if p.stack == stack.name):
    yield place, *batch.sequences[place.feature]
  for place in (p for p in layout.history if p.stack == stack.name):
    events = batch.histories[place.feature]
    yield place, events.ids_EC[:, place.column], events.lengths_B


def _row(ids: jax.Array) -> jax.Array:
  """uint64 rows of the feature's own table; ids are int32, or pairs of words, the low one first."""
  if ids.dtype == jnp.int32:
    return ids.astype(jnp.uint64)
  return ids[..., 0].astype(jnp.uint64) | (ids[..., 1].astype(jnp.uint64) << 32)


def _permuted(row: jax.Array, stack: StackLayout) -> jax.Array:
  if stack.multiplier == 1:
    return row
  return row * jnp.uint64(stack.multiplier) % jnp.uint64(stack.rows)


class Looked(NamedTuple):
  """Looked-up rows as a model reads them."""

  units_BND: jax.Array
  small_BSW: jax.Array  # Rows of small tables side by side.
  events_EFD: dict[str, jax.Array]  # History -> the units of its events, column after column.


def assemble(layout: TableLayout, rows: Rows, batch: Batch) -> Looked:
  """A row of u units is cut into u units of width d. A sequence feature gives as many units as its
  table, the mean over its values; an example without any gets zeros.
  """
  batch_size = len(batch.weight_B)
  units, small, events = [], [], {}
  for stack in layout.stacks:
    sparse = [p for p in layout.sparse if p.stack == stack.name]
    rows_MW, end = rows[stack.name], batch_size * len(sparse)
    looked_BSW = rearrange(rows_MW[:end], "(b s) w -> b s w", b=batch_size)
    if stack.small:
      small.append(looked_BSW)
      continue
    units.append(rearrange(looked_BSW, "b s (u d) -> b (s u) d", d=layout.dim))
    for place, values_E, lengths_B in _jagged(layout, stack, batch):
      start, end = end, end + len(values_E)
      cut = lambda x, axes: rearrange(x, f"{axes} (u d) -> {axes} u d", d=layout.dim)
      if place in layout.history:
        events[place] = cut(rows_MW[start:end], "e")
      else:
        units.append(cut(mean_pool(rows_MW[start:end], lengths_B), "b"))
  histories = dict.fromkeys(p.feature for p in layout.history)
  for name in histories:
    histories[name] = jnp.concatenate([events[p] for p in layout.history if p.feature == name], 1)
  units_BND = jnp.concatenate(units, 1) if units else jnp.zeros((batch_size, 0, layout.dim))
  small_BSW = jnp.concatenate(small, 1) if small else jnp.zeros((batch_size, 0, 0))
  return Looked(units_BND, small_BSW, histories)


def candidate_units(layout: TableLayout, history: str) -> tuple[int, ...]:
  """For each unit of an event the one of `units_BND` that is its counterpart in the example, -1 for
  none: that of the first sparse feature which reads the same table.
  """
  first, count = {}, 0  # Table -> the first unit of the first sparse feature that reads it.
  for stack in (s for s in layout.stacks if not s.small):
    for place in (p for p in layout.sparse if p.stack == stack.name):
      first.setdefault(place.table, count)
      count += place.units
    count += sum(p.units for p in layout.sequence if p.stack == stack.name)
  out = []
  for place in (p for p in layout.history if p.feature == history):
    start = first.get(place.table)
    out += [-1 if start is None else start + u for u in range(place.units)]
  return tuple(out)


def mean_pool(rows_EW: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """(B, W): the mean of each example's values, summed in float32, zeros where it has none."""
  offsets_B1 = jnp.pad(jnp.cumsum(lengths_B), (1, 0))
  return jagged_pool(rows_EW, offsets_B1, mode="mean")
