"""One process of several, a device each, that restores its rows of one large array.

restored_rows.py FOLDER ADDRESS COUNT INDEX: prints its bytes and the peak above what was held.
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemjax.checkpoint import Checkpoints

SHAPE = (1_500_000, 32)  # 192 MB.


def status(field: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])


def save(folder: pathlib.Path) -> None:
  with Checkpoints(folder, keep=2) as checkpoints:
    for step, rows in ((1, 8), (2, SHAPE[0])):
      table = np.arange(rows, dtype=np.float32)[:, None] + np.zeros(SHAPE[1], np.float32)
      checkpoints.save(step, {"table": jnp.asarray(table)}, {}, best=None)


def main(folder: str, address: str, count: int, index: int) -> None:
  jax.distributed.initialize(address, count, index)
  mesh = Mesh(np.array(jax.devices()), "model")
  checkpoints = Checkpoints(pathlib.Path(folder), read_only=True)

  def restore(step: int, rows: int) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    like = jax.ShapeDtypeStruct((rows, SHAPE[1]), jnp.float32, sharding=sharding)
    return checkpoints.restore({"table": like}, step).state["table"]

  restore(1, 8)  # Threads and the like are paid for by next to nothing.
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
  before = status("VmRSS")
  (shard,) = restore(2, SHAPE[0]).addressable_shards
  peak = status("VmHWM") - before
  first = shard.index[0].start
  rows = np.asarray(shard.data)
  assert (rows == first + np.arange(len(rows), dtype=np.float32)[:, None]).all()
  print(json.dumps({"bytes": rows.nbytes, "peak": peak}))


if __name__ == "__main__":
  main(*sys.argv[1:3], *map(int, sys.argv[3:]))
