"""Toy programs compiled for H100s that are not here; prints as JSON what the plan says of them.

Run by test_compiled.py in a process of its own, because XLA reads its flags once.
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemjax.layers.linear import contract
from gemjax.layers.mlp import Mlp
from gemjax.layers.norm import LayerNorm
from gemjax.plan import memory, target
from gemjax.plan.compile import compile_for
from gemjax.plan.estimate import estimate
from gemjax.plan.rates import RATES
from pallas_kernels.deviceless import ptx

DATA, MODEL = 2, 4
BOTH = P(("data", "model"))
ROWS, WIDTH = 10_007, 64  # Rows of a shard of the table: a prime, so that nothing else has it.


def mesh_of(topology, data, model):
  return Mesh(
    target.devices(target.parse_topology(topology)).reshape(data, model), ("data", "model")
  )


def abstract(mesh, shape, dtype, spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def report(name, mesh, local, ins, outs, args, donate=(), rows=(ROWS, ROWS * MODEL)):
  """Compiles `local` as jit_<name> over the mesh and tells everything about it."""
  fn = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
  local.__name__ = fn.__name__ = name
  arrays = [abstract(mesh, *arg, spec) for arg, spec in zip(args, ins)]
  done = compile_for(fn, arrays, donate=donate)
  found = memory.allocations(dump, f"jit_{name}")
  return {
    "collectives": [c._asdict() for c in done.collectives],
    "memory": done.memory._asdict(),
    "written": [b.opcode for b in memory.buffers_like(done.text, rows)],
    "allocated": [v.name for v in memory.allocated_like(found, rows)],
    "allocations": [(a.kind, a.bytes, a.live_out) for a in found],
    "cas": ptx.cas_loops(dump, f"jit_{name}"),
    "adds": sum(c.adds for c in ptx.scan(dump, f"jit_{name}").values()),
    "registers": [r.registers for f, c in ptx.scan(dump, f"jit_{name}").items()
                  if c.kernels for r in ptx.ptxas(f)],
  }  # fmt: skip


def communication(name, mesh, data, model):
  def local(w, x):
    exchanged = lax.all_to_all(x.reshape(model, -1), "model", 0, 0, tiled=True)
    whole = lax.all_gather(w, "model", axis=0, tiled=True)
    h = x
    for _ in range(3):
      h = jax.nn.relu(h @ whole)

    def turn(h, _):
      g = lax.psum_scatter((h.T @ x), "model", scatter_dimension=0, tiled=True)
      return h * 0.5 + jnp.sum(lax.psum(g, "data")), None

    h, _ = lax.scan(turn, h, None, length=5)
    around = lax.ppermute(x, "model", [(i, (i + 1) % model) for i in range(model)])
    return exchanged.reshape(x.shape), h + around, lax.psum(jnp.sum(h), ("data", "model"))

  d, b = 1024, 4096
  args = (((d, d), "float32"), ((data * model * b, d), "float32"))
  return report(name, mesh, local, (P("model"), BOTH), (BOTH, BOTH, P()), args)


def hidden(mesh):
  """Matrix products that do not wait for the exchange beside them."""

  def local(w, x):
    exchanged = lax.all_to_all(x.reshape(8, -1), "model", 0, 0, tiled=True)
    h = x
    for _ in range(4):
      h = jax.nn.relu(h @ w)
    return exchanged.reshape(x.shape), h

  args = (((4096, 4096), "bfloat16"), ((128 * 2048, 4096), "bfloat16"))
  return report("hidden", mesh, local, (P(), BOTH), (BOTH, BOTH), args)


def scheduled(mesh):
  """Seconds that the exchange of two rows is said to take -> products scheduled behind it."""

  def local(w, x, y):
    h = lax.all_to_all(y.reshape(8, -1), "model", 0, 0, tiled=True).reshape(y.shape)
    for _ in range(4):
      x = jax.nn.relu(x @ w)
    return jnp.sin(h), x  # h @ w would become a part of the first product.

  fn = jax.shard_map(local, mesh=mesh, in_specs=(P(), BOTH, BOTH), out_specs=BOTH, check_vma=False)
  shapes = ((4096, 4096), (128 * 2048, 4096), (128 * 8, 4096))
  args = [abstract(mesh, s, "bfloat16", spec) for s, spec in zip(shapes, (P(), BOTH, BOTH))]
  done = compile_for(fn, args)
  found = estimate(done.text, done.collectives, RATES["h100"], 8)
  (exchange,) = done.collectives
  behind = {}
  for seconds in (1e-9, 1.0):
    profile = pathlib.Path(dump) / f"costs_{seconds}.pbtxt"  # XLA reads a path once.
    profile.write_text(found._replace(costs=found.costs | {exchange.name: seconds}).profile())
    (again,) = done.scheduled_by(profile).collectives
    behind[str(seconds)] = again.matmuls
  return behind


def swapped(mesh):
  """An exchange along the wrong axis, and one in a loop whose count only the data tells."""

  def local(x):
    x = lax.all_to_all(x.reshape(DATA, -1), "data", 0, 0, tiled=True).reshape(x.shape)
    rounds = lax.pmax(jnp.max(x), "model").astype(jnp.int32)
    return lax.fori_loop(0, rounds, lambda i, x: lax.all_gather(x, "model")[i % MODEL], x)

  return report("swapped", mesh, local, (BOTH,), BOTH, (((DATA * MODEL * 512, 8), "float32"),))


def table(name, mesh, update, dtype="float32", width=WIDTH, donate=0):
  shape = (ROWS * MODEL, width) if width else (ROWS * MODEL,)
  rows = ((DATA * MODEL * 512, *shape[1:]), "float32")
  args = ((shape, dtype), ((DATA * MODEL * 512,), "int32"), rows)
  return report(name, mesh, update, (P("model"), BOTH, BOTH), P("model"), args, donate)


def add(t, i, g):
  return t.at[i].add(g.astype(t.dtype), mode="drop")


def assign(t, i, g):
  return t.at[i].set(g.astype(t.dtype), mode="drop")


def assign_unique(t, i, g):
  return t.at[i].set((t[i] - g).astype(t.dtype), mode="drop", unique_indices=True)


def dense_gradient(t, i, g):
  return t - 0.1 * jax.grad(lambda t: jnp.sum(t[i] * g))(t)


def in_a_branch(t, i, g):
  return lax.cond(jnp.max(i) > 3, lambda t: assign_unique(t, i, g), lambda t: t, t)


def in_a_loop(t, i, g):
  return lax.fori_loop(0, jnp.max(i), lambda k, t: assign_unique(t, i + k, g), t)


def gathered(t, i, g):
  return assign_unique(t, i, lax.all_gather(t, "model", tiled=True)[i] + g)


def target_of(name):
  mesh = mesh_of(f"{name}:1x1", 1, 1)
  x = abstract(mesh, (512, 512), "bfloat16", P())
  fn = lambda x: jnp.sin(x @ x)
  fn.__name__ = f"on_{name}"
  done = compile_for(fn, (x,))
  code = "".join(f.read_text() for f in ptx.scan(dump, f"jit_on_{name}"))
  return {"cublas": "__cublas$lt$matmul" in done.text, "sm": code.split(".target ")[1].split()[0]}


def eight_bits(name):
  """cuBLAS's products of two 8-bit maps and their gradients."""
  mesh = mesh_of(f"{name}:1x1", 1, 1)

  def step(w, v, x, g):
    product = lambda x, w: contract("bi,io->bo", x, w, len(w), "bfloat16", float8=True)
    y, pullback = jax.vjp(lambda w, v, x: product(jax.nn.relu(product(x, w)), v), w, v, x)
    return y, pullback(g)

  shapes = ((512, 1024), "float32"), ((1024, 256), "float32"), ((2048, 512), "bfloat16")
  args = [abstract(mesh, *s, P()) for s in (*shapes, ((2048, 256), "bfloat16"))]
  done = compile_for(step, args)
  found = estimate(done.text, done.collectives, RATES[name], 1)
  return {
    "products": re.findall(r'custom_call_target="(__cublas[^"]*)"', done.text),
    "flops": found.flops(),
    "float8_flops": found.flops("f8"),
  }


def layers():
  """Bytes that kernels of layers move, forward and backward, in arrays of the shape of x."""
  mesh = mesh_of("h100:1x1", 1, 1)
  T, D = 65_536, 256
  x = abstract(mesh, (T, D), "bfloat16", P())
  modules = {
    "norm": LayerNorm(D, "bfloat16", nnx.Rngs(0)),
    "mlp": Mlp(D, (D,), D, dtype="bfloat16", rngs=nnx.Rngs(0)),
  }
  out = {}
  for name, module in modules.items():
    graph, weights = nnx.split(module)
    weights = jax.tree.map(lambda w: abstract(mesh, w.shape, w.dtype, P()), weights)

    def step(weights, x, dy, graph=graph):
      y, pullback = jax.vjp(lambda weights, x: nnx.merge(graph, weights)(x), weights, x)
      return y, pullback(dy)

    done = compile_for(step, (weights, x, x))
    found = estimate(done.text, done.collectives, RATES["h100"], 1)
    moved = sum(o.trips * o.work.bytes for o in found.operations)
    epilogues = re.findall(r'"epilogue":"(\w+)"', done.text)
    out[name] = {"passes": moved / (2 * T * D), "epilogues": epilogues}
  return out


(dump,) = sys.argv[1:]
mesh = mesh_of(f"h100:{DATA}x{MODEL}", DATA, MODEL)
hosts = np.vectorize(lambda d: d.process_index)(mesh.devices)
print(
  json.dumps(
    {
      "hosts": hosts.tolist(),
      "communication": communication("communication", mesh, DATA, MODEL),
      "wide": communication("wide", mesh_of("h100:16x8", 2, 64), 2, 64),
      "hidden": hidden(mesh_of("h100:16x8", 16, 8)),
      "scheduled": scheduled(mesh_of("h100:16x8", 16, 8)),
      "swapped": swapped(mesh),
      "add": table("add", mesh, add),
      "add_vector": table("add_vector", mesh, add, width=0),
      "assign": table("assign", mesh, assign, "bfloat16"),
      "unique": table("unique", mesh, assign_unique),
      "unique_bf16": table("unique_bf16", mesh, assign_unique, "bfloat16"),
      "loop": table("loop", mesh, in_a_loop),
      "kept": table("kept", mesh, assign_unique, donate=()),
      "dense": table("dense", mesh, dense_gradient),
      "branch": table("branch", mesh, in_a_branch),
      "gathered": table("gathered", mesh, gathered),
      "eight_bits": {name: eight_bits(name) for name in ("a100", "h100")},
      "layers": layers(),
      "targets": {name: target_of(name) for name in target.TARGETS},
    }
  )
)
