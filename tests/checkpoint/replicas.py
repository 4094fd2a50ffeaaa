"""One process of several that all hold a large array: replicas.py FOLDER ADDRESS COUNT INDEX.

It prints how many bytes TensorStore has read, or the error. FAULT=INDEX: that process cannot read.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.checkpoint import CheckpointError, Checkpoints, checkpoints
from gemjax.parallel.mesh import make_mesh

SHAPE = (1 << 19, 32)  # 64 MiB: two pieces.
READ = "/tensorstore/kvstore/file/bytes_read"


def state() -> dict[str, np.ndarray]:
  table = np.arange(SHAPE[0], dtype=np.float32)[:, None] + np.zeros(SHAPE[1], np.float32)
  return {"table": table, "small": np.arange(10.0, dtype=np.float32)}


def save(folder: pathlib.Path) -> None:
  with Checkpoints(folder) as found:
    found.save(1, jax.tree.map(jnp.asarray, state()), {}, best=None)


def bytes_read() -> int:
  (metric,) = ts.experimental_collect_matching_metrics(READ)
  return sum(value["value"] for value in metric["values"])


def broken(*args):
  raise OSError("the cable is out")


def main(folder: str, address: str, count: int, index: int) -> None:
  jax.distributed.initialize(address, count, index)
  if os.environ.get("FAULT") == str(index):
    checkpoints.read_shards = broken
  sharding = NamedSharding(make_mesh(count, 1), PartitionSpec("model"))
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in state().items()
  }
  try:
    found = Checkpoints(pathlib.Path(folder), read_only=True).restore(like).state
  except CheckpointError as error:
    print(error, flush=True)
    os._exit(1)  # Not the farewell of JAX, which waits for the others.
  for name, wanted in state().items():
    assert found[name].sharding == sharding
    np.testing.assert_array_equal(found[name].addressable_data(0), wanted)
  print(bytes_read())


if __name__ == "__main__":
  main(*sys.argv[1:3], *map(int, sys.argv[3:]))
