"""What the devices of one process hold of all arrays, in one file: each shard once, end to end.

FOLDER/arrays      the bytes of the parts
FOLDER/parts.json  the parts, in their order
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from gemjax.checkpoint.checked import BLOCK, CorruptError, check_digest
from gemjax.checkpoint.shards import THREADS, Index, aligned, bounds, indices_of, name_of

ARRAYS, PARTS = "arrays", "parts.json"


class Part(NamedTuple):
  """A shard, by its place in the whole array, which any process may hold."""

  name: str
  dtype: str
  shape: tuple[int, ...]  # Of the whole array.
  index: Index

  @property
  def own_shape(self) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in self.index)


def parts_of(like: Any) -> list[dict[jax.Device, Part]]:
  """For each array, what every device of this process holds of it.

  Args:
    like: Tree of arrays or `jax.ShapeDtypeStruct`.
  """
  return [
    {d: Part(name_of(path), str(leaf.dtype), leaf.shape, i) for d, i in indices_of(leaf).items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like)
  ]


def copied(state: Any) -> dict[Part, np.ndarray]:
  """What the devices of this process hold, where no later step overwrites it."""
  shards: dict[Part, jax.Array] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    for shard in leaf.addressable_shards:
      index = bounds(shard.index, leaf.shape)
      shards.setdefault(Part(name_of(path), str(leaf.dtype), leaf.shape, index), shard.data)
  for data in shards.values():
    data.copy_to_host_async()
  with ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(shards, pool.map(_copied, shards.values()), strict=True))


def write_parts(folder: pathlib.Path, parts: Mapping[Part, np.ndarray]) -> None:
  """Raises OSError."""
  with (folder / ARRAYS).open("wb") as stream:
    for array in parts.values():
      stream.write(_bytes(array))
  (folder / PARTS).write_text(json.dumps(list(parts)))


def read_parts(folder: pathlib.Path, wanted: set[Part]) -> dict[Part, np.ndarray]:
  """The wanted parts, as far as they are here; the whole folder is checked beside.

  Raises:
    CorruptError: it is not what was written.
  """
  with ThreadPoolExecutor(THREADS) as pool:
    checked = pool.submit(check_digest, folder)
    try:
      found, pieces = {}, []
      for part, at in _stored(folder):
        if part in wanted:
          found[part] = aligned(part.own_shape, np.dtype(part.dtype))
          whole = memoryview(_bytes(found[part]))
          pieces += [(at + i, whole[i : i + BLOCK]) for i in range(0, len(whole), BLOCK)]
      list(pool.map(lambda piece: _read(folder / ARRAYS, *piece), pieces))
      checked.result()
    except CorruptError:
      raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
      checked.result()  # It says which file, and why.
      raise CorruptError(f"{folder} could not be read ({error})") from error
  return found


def _copied(data: jax.Array) -> np.ndarray:
  on_cpu = all(device.platform == "cpu" for device in data.devices())
  # Of a CPU's array NumPy sees the device's own memory.
  return np.array(data, order="C") if on_cpu else np.ascontiguousarray(data)


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)


def _stored(folder: pathlib.Path) -> Iterator[tuple[Part, int]]:
  """Each part and its first byte."""
  at = 0
  for name, dtype, shape, index in json.loads((folder / PARTS).read_text()):
    part = Part(name, dtype, tuple(shape), tuple((start, stop) for start, stop in index))
    yield part, at
    at += math.prod(part.own_shape) * np.dtype(dtype).itemsize


def _read(file: pathlib.Path, at: int, out: memoryview) -> None:
  with file.open("rb", buffering=0) as stream:
    stream.seek(at)
    while out:
      count = stream.readinto(out)
      if not count:
        raise CorruptError(f"{file} is truncated")
      out = out[count:]
