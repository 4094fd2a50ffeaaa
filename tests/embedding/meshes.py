"""Tables of several rules side by side on one mesh of the virtual devices, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
from examples import LAYOUT, B, embedding, make_batch
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.config import DATA, MODEL
from gemjax.embedding import ShardedTables, assemble
from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.embedding.stack import Stack

ALL = PartitionSpec((DATA, MODEL))
ONE = PartitionSpec()
# Compiles in half the time; LLVM's share alone is left out, XLA's own passes run.
FAST = {"xla_backend_optimization_level": 0}
RULES = {  # Every optimiser, every kind of shrinking.
  "rowwise": {"optimizer": "rowwise_adagrad", "l2": 0.02},
  "adagrad": {"optimizer": "adagrad", "weight_decay": 0.3},
  "adam": {"optimizer": "lazy_adam", "l2": 0.02},
  "sgd": {"optimizer": "sgd"},
  "half": {"optimizer": "rowwise_adagrad", "weight_decay": 0.3, "dtype": "bfloat16"},
  "half adam": {"optimizer": "lazy_adam", "l2": 0.02, "dtype": "bfloat16"},
}


def rate(t):
  """A warm-up and a drop."""
  return np.float32(0.1 * min(1.0, (t + 1) / 4) * (0.5 if t > 7 else 1.0))


def make_mesh(data, model):
  auto, devices = (jax.sharding.AxisType.Auto,) * 2, jax.devices()[: data * model]
  return jax.make_mesh((data, model), (DATA, MODEL), auto, devices=devices)


class Run:
  """`capacity` of 0 is room for all ids of a batch."""

  def __init__(self, data, model, rules, capacity=0, replicas="exact"):
    self.data, self.model, self.devices = data, model, data * model
    self.mesh = make_mesh(data, model)
    self.capacity = capacity or 4 * B
    self.tables = {
      name: ShardedTables(
        layout=LAYOUT, config=embedding(**RULES[name], replicas=replicas), data=data, model=model,
        capacity={s.name: self.capacity for s in LAYOUT.stacks},
      ) for name in rules
    }  # fmt: skip
    self.specs = {name: t.specs() for name, t in self.tables.items()}
    self._step = jax.jit(
      self.on_devices(self._device_step, (self.specs, ALL, ALL, ONE, ONE), (self.specs, ALL, ALL)),
      donate_argnums=0,
      compiler_options=FAST,
    )
    average = self.on_devices(self._average, (self.specs, ONE), self.specs)
    self.average = jax.jit(average, compiler_options=FAST)

  def on_devices(self, function, in_specs, out_specs):
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

  def step(self, stacks, kind, t, coef_BND, repeat=1):
    """(stacks, rule -> units_BND, rounds of every device); the old stacks are donated."""
    batch = make_batch(kind, t, self.devices, repeat)
    return self._step(stacks, batch, coef_BND, rate(t), jax.random.key(t))

  def _device_step(self, stacks, batch, coef_BND, lr, key):
    first = next(iter(self.tables.values()))
    plans = first.plan(batch)
    rows = {name: t.lookup(stacks[name], plans) for name, t in self.tables.items()}
    units = {name: assemble(LAYOUT, r, batch)[0] for name, r in rows.items()}
    loss = lambda rows: (assemble(LAYOUT, rows, batch)[0] * coef_BND).sum()
    grads = jax.grad(loss)(next(iter(rows.values())))
    new = {n: t.update(stacks[n], plans, grads, lr, key) for n, t in self.tables.items()}
    return new, units, first.rounds(plans)[None]

  def _average(self, stacks, key):
    return {name: t.average(stacks[name], key) for name, t in self.tables.items()}

  def born(self):
    """The same stacks on every mesh, with rows from N(0, 1)."""
    rng = np.random.default_rng(0)
    rows = {s.name: rng.normal(size=(s.rows, s.width)) for s in LAYOUT.stacks}
    put = lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec))
    born = {}
    for name, t in self.tables.items():
      init = ROW_OPTIMIZERS[t.config.optimizer]().init
      shrinks = t.config.l2 or t.config.weight_decay
      whole = {
        s.name: Stack(
          np.asarray(rows[s.name], jnp.dtype(t.config.dtype)), init(s.rows, s.width),
          np.zeros(s.rows, np.float32) if shrinks else None,
          np.zeros(2, np.float32) if shrinks else None,
        ) for s in LAYOUT.stacks
      }  # fmt: skip
      born[name] = jax.tree.map(put, whole, self.specs[name])
    return born

  def copy(self, tree, group):
    """The copy of global arrays that the devices of a group hold, as numpy."""
    devices = set(self.mesh.devices[group])

    def gather(array):
      out = np.empty(array.shape, array.dtype)
      for shard in array.addressable_shards:
        if shard.device in devices:
          out[shard.index] = np.asarray(shard.data)
      return out

    return jax.tree.map(gather, tree)


def assert_copies_agree(tree, where=""):
  """Devices that hold the same part of an array hold the same bits."""
  for path, array in jax.tree_util.tree_leaves_with_path(tree):
    seen = {}
    for shard in array.addressable_shards:
      bits = np.asarray(shard.data).tobytes()
      assert bits == seen.setdefault(str(shard.index), bits), where + jax.tree_util.keystr(path)


def numpy(tree):
  return jax.tree.map(np.array, tree)
