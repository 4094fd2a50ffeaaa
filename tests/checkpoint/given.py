"""One process of two that keep snapshots on disks of their own, and one of which loses the last:
given.py FOLDER ADDRESS COUNT INDEX.

It prints, for a state that has replicas and for one that in part has none, what it is told.
"""

import pathlib
import shutil
import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from test_snapshots import like, same, state

from gemjax.checkpoint import Snapshots
from gemjax.parallel.mesh import make_mesh


def main(folder: str, address: str, count: int, index: int) -> None:
  jax.distributed.initialize(address, count, index)
  mesh = make_mesh(count, 2)
  for name, without in (("copied", {"both"}), ("split", set())):
    tree = lambda step: {n: x for n, x in state(mesh, step).items() if n not in without}  # noqa: B023
    disk = pathlib.Path(folder) / f"host{index}" / name
    snapshots = Snapshots(disk)
    for step in (1, 2):
      snapshots.save(step, tree(step), {"step": step, "valid": np.pi})
    snapshots.wait()
    if index == 1:
      shutil.rmtree(disk / "000000002.1")
    sync_global_devices(name)
    found, passed = snapshots.restore(like(tree(0)), snapshots.steps(after=0))
    same(found.state, tree(found.step))
    assert found.notes == {"step": found.step, "valid": np.pi}
    print(name, found.step, *found.passed, *passed, sep=", ")


if __name__ == "__main__":
  main(*sys.argv[1:3], *map(int, sys.argv[3:]))
