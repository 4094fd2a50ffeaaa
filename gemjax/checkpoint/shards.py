"""The arrays of a checkpoint, read straight into the shards of any mesh.

Each process reads the rows that its devices hold, in pieces and side by side. Host memory holds the
arrays on their way to the devices, WINDOW bytes or one shard of the largest, and a piece a thread.
On a CPU they are the devices' own: only a program that they are donated to copies them.
"""

from __future__ import annotations

import collections
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

THREADS = max(4, min(16, os.cpu_count() or 1))
WINDOW = 1 << 28  # Bytes.
ALIGNED = 64  # Bytes; XLA copies what lies otherwise.

Index = tuple[tuple[int, int], ...]  # Start and stop on every axis.


class ShapeError(ValueError):
  """A checkpoint that does not hold the arrays that are asked for."""


class _Pending(NamedTuple):
  """An array that is being read."""

  place: int  # In the tree.
  parts: dict[Index, np.ndarray]
  futures: list[Future]
  nbytes: int


def read_shards(folder: pathlib.Path, like: Any) -> Any:
  """The tree of arrays in `folder`, shaped and placed as `like`.

  Args:
    folder: Where Orbax has written them: OCDBT of Zarr arrays, by their paths in the tree.
    like: Tree of `jax.Array` or of `jax.ShapeDtypeStruct` with a sharding; one device otherwise.

  Raises:
    ShapeError: there are others, or they have other shapes or types.
    ValueError: as TensorStore reports what it cannot read or decode.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(like)
  names, leaves = [name_of(path) for path, _ in leaves], [leaf for _, leaf in leaves]
  context = ts.Context()
  stores = _open(folder, names, context)
  for name, leaf, store in zip(names, leaves, stores, strict=True):
    found = store.shape, store.dtype.numpy_dtype
    if found != (leaf.shape, leaf.dtype):
      wanted = f"{leaf.dtype}{[*leaf.shape]}"
      raise ShapeError(f"{folder} has {name!r} as {found[1]}{[*found[0]]}, not as {wanted}")
  arrays: list[Any] = [None] * len(leaves)
  pending: collections.deque[_Pending] = collections.deque()

  def finish(one: _Pending) -> None:
    for future in one.futures:
      future.result()
    arrays[one.place] = placed(leaves[one.place], one.parts)

  with ThreadPoolExecutor(THREADS) as pool:
    try:
      for place in sorted(range(len(leaves)), key=lambda i: -leaves[i].size):
        pending.append(_begin(pool, place, leaves[place], stores[place], context))
        while sum(one.nbytes for one in pending) > WINDOW and len(pending) > 1:
          finish(pending.popleft())
      while pending:
        finish(pending.popleft())
    finally:
      pool.shutdown(cancel_futures=True)  # After an error.
  return jax.tree.unflatten(tree, arrays)


def name_of(path: tuple[Any, ...]) -> str:
  """As Orbax names an array: its path in the tree, joined by dots."""
  keys = (
    getattr(key, kind) for key in path for kind in ("key", "idx", "name") if hasattr(key, kind)
  )
  return ".".join(map(str, keys))


def _open(folder: pathlib.Path, names: list[str], context: ts.Context) -> list[ts.TensorStore]:
  base = {"driver": "ocdbt", "base": f"file://{folder}/"}
  keys = ts.KvStore.open(base, context=context).result().list().result()
  found = {key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")}
  for names_of, others, what in ((names, found, "no array"), (found, {*names}, "an unknown array")):
    if missing := sorted(set(names_of) - set(others)):
      raise ShapeError(f"{folder} has {what} {missing[0]!r}")
  spec = lambda name: {"driver": "zarr", "kvstore": base | {"path": f"{name}/"}}
  return [f.result() for f in [ts.open(spec(n), read=True, context=context) for n in names]]


def _begin(pool, place: int, leaf: Any, store: ts.TensorStore, context: ts.Context) -> _Pending:
  """Starts to read what the devices of this process hold of an array, each part of it once."""
  indices = set(indices_of(leaf).values())
  parts = {i: aligned([b - a for a, b in i], leaf.dtype) for i in indices}
  rows = (store.chunk_layout.read_chunk.shape or (1,))[0]
  futures = []

  def read(source: ts.TensorStore, out: np.ndarray) -> None:
    target = ts.array(out, context=context, copy=False)
    target[ts.d[:].translate_to[source.domain.origin]].write(source).result()

  for index, out in parts.items():
    region = store[tuple(slice(a, b) for a, b in index)]
    if not index:
      futures.append(pool.submit(read, region, out))
      continue
    first, stop = index[0]
    for at in range(first // rows * rows, stop, rows):  # A stored piece at a time.
      a, b = max(at, first), min(at + rows, stop)
      futures.append(pool.submit(read, region[a:b], out[a - first : b - first]))
  return _Pending(place, parts, futures, sum(out.nbytes for out in parts.values()))


def placed(leaf: Any, parts: Mapping[Index, np.ndarray]) -> jax.Array:
  """The array whose shards on this process are `parts`, shaped and placed as `leaf`."""
  indices = indices_of(leaf)
  # Devices that hold the same do not share it.
  first = {index: device for device, index in reversed(indices.items())}
  held = [
    jax.device_put(parts[index], device, may_alias=first[index] == device)
    for device, index in indices.items()
  ]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding_of(leaf), held)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array that a CPU device may take without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + ALIGNED, np.uint8)
  start = -memory.ctypes.data % ALIGNED
  return memory[start : start + size].view(dtype).reshape(shape)


def indices_of(leaf: Any) -> dict[jax.Device, Index]:
  """What each device of this process holds."""
  found = sharding_of(leaf).addressable_devices_indices_map(leaf.shape)
  return {device: bounds(index, leaf.shape) for device, index in found.items()}


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
  """Where a shard lies in an array of this shape, as JAX tells it in slices."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
  """Where `leaf` lies: one device unless it says."""
  return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
