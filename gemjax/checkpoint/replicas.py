"""What several processes hold alike is read by each in part, and completed over the mesh.

Between `divided` and `completed` all processes must have agreed that nothing failed: a process
that is missing from a gather leaves the others waiting.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Bytes of an array below which a part is no less to read: it is stored in pieces of up to so much.
LEAST = 1 << 26


def divided(like: Any) -> Any:
  """`like`, its large arrays split further by rows: over the mesh axes that they are copied along.

  Args:
    like: Tree of arrays or `jax.ShapeDtypeStruct`.
  """
  if jax.process_count() == 1:
    return like
  return jax.tree.map(_divided, like)


def completed(state: Any, like: Any) -> Any:
  """The arrays of `divided(like)` placed as `like`, one after the other; all must call it."""

  def placed(array: jax.Array, leaf: Any) -> jax.Array:
    if leaf.sharding is None or array.sharding == leaf.sharding:
      return array
    whole = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=leaf.sharding)(array))
    array.delete()  # So that no more than one array is held twice.
    return whole

  return jax.tree.map(placed, state, like)


def _divided(leaf: Any) -> Any:
  sharding = leaf.sharding
  if not isinstance(sharding, NamedSharding) or leaf.size * leaf.dtype.itemsize < LEAST:
    return leaf
  mesh, spec = sharding.mesh, [*sharding.spec]
  used = {name for entry in spec for name in _names(entry)}
  free = tuple(n for n in mesh.axis_names if n not in used and mesh.shape[n] > 1)
  first = *_names(spec[0] if spec else None), *free
  if not free or leaf.shape[0] % math.prod(mesh.shape[name] for name in first):
    return leaf
  finer = NamedSharding(mesh, PartitionSpec(first, *spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=finer)


def _names(entry: Any) -> tuple[str, ...]:
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)
