"""Values at the first and the last key of all, as the Mosaic kernel may read them.

Letters: E keys, H heads, D width, R rows of both edges.
"""

from __future__ import annotations

import jax.numpy as jnp

ALIGNED = 8  # Rows: TMA would leave out the end of a tile that it starts amid.


def rows(v_EHD, kv_offsets_S1, keys: int):
  """(inside_2, the rows at the first and at the last key of all, in two halves).

  Rows outside of the segments may be NaN. Masks keep their scores out, but 0 * NaN would remain, so
  tiles with such rows come from here, where they are zeros.
  """
  inside_2 = jnp.stack([kv_offsets_S1[0], kv_offsets_S1[-1]])
  row_R = jnp.arange(2 * keys + ALIGNED)
  row_R = jnp.concatenate([base + row_R for base in _bases(*inside_2, keys)])
  own_R = (row_R >= inside_2[0]) & (row_R < inside_2[1])
  return inside_2, jnp.where(own_R[:, None, None], v_EHD.at[row_R].get(mode="clip"), 0)


def _bases(begin, end, keys: int):
  aligned = lambda row: row - row % ALIGNED
  return aligned(begin), aligned(jnp.maximum(end - keys, 0))


def start(begin, end, key, keys: int):
  """Where in `rows` the tile from `key` on begins; negative if all its rows are inside."""
  front, back = _bases(begin, end, keys)
  row = jnp.where(key + keys > end, 2 * keys + ALIGNED + key - back, -1)
  return jnp.where(key < begin, key - front, row)
