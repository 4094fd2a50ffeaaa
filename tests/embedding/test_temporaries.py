"""What the compiled step needs beside the tables: nothing of a table's rows.

Of float32 tables: XLA for CPUs has no bfloat16 gather, and converts the whole of such a table.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import ALL, ONE

from gemjax.config import Embedding
from gemjax.embedding import ShardedTables, layout_tables
from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.features import Batch, FeatureSet, Sparse

ROWS, B = 1_000_000, 32
FEATURES = FeatureSet(
  sparse=tuple(Sparse(name=n, size=ROWS, table=n) for n in ("row", "column", "replicated"))
)


def step_memory(data, model, **changes):
  """(bytes of the tables of a device, memory of the compiled step of a device)."""
  config = Embedding(dim=8, placement={n: n for n in FEATURES.tables}, **changes)
  layout = layout_tables(FEATURES, config)
  tables = ShardedTables.on_mesh(layout, config, data, model).with_capacity({"row8": 8})
  specs, mesh = tables.specs(), meshes.make_mesh(data, model)
  wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

  def step(stacks, batch, lr, key):
    plans = tables.plan(batch)
    rows = tables.lookup(stacks, plans)
    return tables.update(stacks, plans, rows, lr, key)

  shapes = jax.eval_shape(wrap(tables.init, in_specs=ONE, out_specs=specs), jax.random.key(0))
  put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  stacks = jax.tree.map(put, shapes, specs)
  batch = Batch(
    **{name: np.zeros((B, 1), np.float32) for name in ("dense_BF", "label_BT", "oracle_BT")},
    **{name: np.zeros(B, np.float32) for name in ("weight_B", "group_B")},
    ids_BS=np.zeros((B, 3), np.int32),
    sequences={},
  )
  sharded = wrap(step, in_specs=(specs, ALL, ONE, ONE), out_specs=specs)
  lowered = jax.jit(sharded, donate_argnums=0).lower(
    stacks, batch, jnp.float32(0.1), jax.random.key(0)
  )
  held = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(stacks)
  )
  return held, lowered.compile().memory_analysis()


@pytest.mark.parametrize("shrinking", [{}, {"weight_decay": 0.1}, {"l2": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", sorted(ROW_OPTIMIZERS))
def test_one_device(optimizer, shrinking):
  held, memory = step_memory(1, 1, optimizer=optimizer, **shrinking)
  assert memory.alias_size_in_bytes >= held  # Overwritten in place.
  assert memory.temp_size_in_bytes < 100_000 < ROWS  # Not even a byte a row.


@pytest.mark.parametrize(
  ("data", "model", "changes"),
  [
    (2, 4, {"optimizer": "rowwise_adagrad", "l2": 0.1}),
    (2, 2, {"optimizer": "lazy_adam", "l2": 0.1}),
    (2, 2, {"optimizer": "adagrad", "weight_decay": 0.1, "replicas": "average"}),
  ],
)
def test_several_devices(data, model, changes):
  held, memory = step_memory(data, model, **changes)
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < 200_000 < ROWS // model
