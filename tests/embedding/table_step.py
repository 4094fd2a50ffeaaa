"""A step of tables alone, lowered and not run: one table by row, one by column, one replicated.

As a program it prints as JSON the bytes of temporaries on an H100 for two sizes of the tables; run
by test_temporaries.py in a process of its own, because XLA reads its flags once.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemjax.config import DATA, MODEL, Embedding
from gemjax.embedding import ShardedTables, layout_tables
from gemjax.features import Batch, FeatureSet, Sparse
from gemjax.plan import target

B = 32
ALL, ONE = PartitionSpec((DATA, MODEL)), PartitionSpec()


def lowered(mesh, rows, platform, **changes):
  """(bytes of the tables of a device, the lowered step)."""
  names = ("row", "column", "replicated")
  features = FeatureSet(sparse=tuple(Sparse(name=n, size=rows, table=n) for n in names))
  config = Embedding(dim=8, placement={n: n for n in names}, **changes)
  layout = layout_tables(features, config)
  tables = ShardedTables.on_mesh(layout, config, mesh.shape[DATA], mesh.shape[MODEL])
  tables = tables.with_capacity({"row8": 8})
  specs = tables.specs()
  wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

  def step(stacks, batch, lr, key):
    plans = tables.plan(batch)
    rows = tables.lookup(stacks, plans)
    return tables.update(stacks, plans, rows, lr, key)

  key, lr = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
  shapes = jax.eval_shape(wrap(tables.init, in_specs=ONE, out_specs=specs), key)
  put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  stacks = jax.tree.map(put, shapes, specs)
  batch = Batch(
    **{name: np.zeros((B, 1), np.float32) for name in ("dense_BF", "label_BT", "oracle_BT")},
    **{name: np.zeros(B, np.float32) for name in ("weight_B", "group_B")},
    ids_BS=np.zeros((B, 3), np.int32),
    sequences={},
  )
  sharded = wrap(step, in_specs=(specs, ALL, ONE, ONE), out_specs=specs)
  traced = jax.jit(sharded, donate_argnums=0).trace(stacks, batch, lr, key)
  held = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(stacks)
  )
  return held, traced.lower(lowering_platforms=(platform,))


def main():
  devices = target.devices(target.parse_topology("h100:1x4")).reshape(2, 2)
  changes = {"optimizer": "lazy_adam", "l2": 0.1, "dtype": "bfloat16"}
  sizes = []
  for rows in (1_000_000, 2_000_000):
    _, step = lowered(Mesh(devices, (DATA, MODEL)), rows, "cuda", **changes)
    sizes.append(step.compile().memory_analysis().temp_size_in_bytes)
  print(json.dumps(sizes))


if __name__ == "__main__":
  main()
