"""Host arrays of one process <-> global arrays that are split over all devices.

Process p of P holds the p-th part of every batch, as its devices are the p-th part of the mesh.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from gemjax.parallel.placement import spec

BATCH = spec("batch")
T = TypeVar("T")

_calls: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def to_devices(mesh: Mesh, batch: Any) -> Any:
  """A tree of this process' rows as global arrays."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def to_host(x: jax.Array) -> np.ndarray:
  """This process' rows of a global array that is split as a batch."""
  if x.is_fully_addressable:
    return np.asarray(x)
  shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def of_all_processes(x: np.ndarray) -> np.ndarray:
  """The rows of all processes, one process behind the other; every process must call it."""
  if jax.process_count() == 1:
    return x
  return multihost_utils.process_allgather(x, tiled=True)


def first_process_first(name: str, function, *args) -> Any:
  """`function(*args)` on process 0, then on the others, which find what the first has made."""
  if jax.process_index():
    multihost_utils.sync_global_devices(name)
  result = function(*args)
  if not jax.process_index():
    multihost_utils.sync_global_devices(name)
  return result


def after_first_process(name: str, function: Callable[[], T]) -> T:
  """`function()` on process 0, then on the others, from whatever thread: they hear of it through
  JAX's coordinator, while another thread may run programs of all devices.
  """
  from jax._src import distributed  # Nowhere public.

  client = distributed.global_state.client
  if client is None or jax.process_count() == 1:
    return function()
  key = (
    f"gemjax/{name}/{next(_calls[name])}"  # All processes make the calls of a name in one order.
  )
  if jax.process_index():
    client.blocking_key_value_get(key, 24 * 3600 * 1000)  # Peers end what takes too long.
    return function()
  result = function()
  client.key_value_set(key, "done")
  return result
