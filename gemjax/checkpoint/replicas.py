"""What several processes hold alike is read by each in part, and completed over the mesh; or by
those that can, and given to the others.

Between `divided` and `completed`, and before `given`, all processes must have agreed that nothing
failed: a process that is missing from a gather leaves the others waiting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.checkpoint.shards import Index, bounds, indices_of, sharding_of

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


def givers(leaf: Any, has: Mapping[jax.Device, bool]) -> dict[Index, jax.Device] | None:
  """The first device that has it, for each shard; None where one is nowhere. All find the same.

  Args:
    leaf: The array, or a `jax.ShapeDtypeStruct`.
    has: Of every device of its mesh, whether its process has what it shall hold.
  """
  found: dict[Index, jax.Device | None] = {}
  for device, slices in sharding_of(leaf).devices_indices_map(leaf.shape).items():
    index = bounds(slices, leaf.shape)
    found[index] = found.get(index) or (device if has[device] else None)
  return None if None in found.values() else found


def given(
  leaf: Any, parts: Mapping[Index, np.ndarray], sources: Mapping[Index, jax.Device]
) -> jax.Array:
  """The array of which this process has read `parts`; the rest comes from the `givers`.

  Bytes are summed over the axes along which the array is copied, all but the giver's being zeros,
  so that every bit arrives. All must call it.
  """
  mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  shape, dtype = leaf.sharding.shard_shape(leaf.shape), np.dtype(leaf.dtype)
  used = {name for entry in spec for name in _names(entry)}
  copied = tuple(name for name in mesh.axis_names if name not in used)
  size = math.prod(shape) * dtype.itemsize

  def row(device: jax.Device, index: Index) -> jax.Array:
    here = sources[index] == device
    return jax.device_put(_row(parts[index]) if here else np.zeros((1, size), np.uint8), device)

  def shard(row: jax.Array) -> jax.Array:
    found = jax.lax.psum(row, copied)
    if dtype.kind == "b":
      return found.reshape(shape).astype(bool)
    found = found.reshape(shape if dtype.itemsize == 1 else (*shape, dtype.itemsize))
    return jax.lax.bitcast_convert_type(found, dtype)

  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  sent = jax.make_array_from_single_device_arrays(
    (mesh.size, size), rows, [row(*held) for held in indices_of(leaf).items()]
  )
  summed = jax.shard_map(shard, mesh=mesh, in_specs=rows.spec, out_specs=spec, check_vma=False)
  return jax.jit(summed, out_shardings=leaf.sharding)(sent)


def _row(part: np.ndarray) -> np.ndarray:
  return part.reshape(1, -1).view(np.uint8)


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
