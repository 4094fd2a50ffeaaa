"""Compiles training steps for absent H100s and prints what test_training_step.py asks, as JSON.

python steps.py DUMP_FOLDER MESH
"""

import json
import sys

import jax

from gemjax import config as c
from gemjax.features import Dense, FeatureSet, Sequence, Sparse
from gemjax.parallel import placement
from gemjax.plan import memory, report, target
from gemjax.plan.training import plan_training
from pallas_kernels.deviceless import ptx


def get_features(users: int) -> FeatureSet:
  """Of sizes that no other array of the program has."""
  item = {"size": 3_000_017, "table": "item"}
  return FeatureSet(
    dense=(Dense(name="price"),),
    sparse=(
      Sparse(name="user", size=users, table="user"),
      Sparse(name="item", **item),
      Sparse(name="hour", size=26, table="hour"),
      Sparse(name="page", size=200_003, table="page"),
    ),
    sequence=(Sequence(name="history", max_length=8, **item),),
  )


def get_config(dtype: str) -> c.Config:
  return c.Config(
    name="planned",
    data=c.Data(batch_size=262_144),
    embedding=c.Embedding(
      dim=64, units={"page": 4}, placement={"page": "column"}, dtype=dtype, l2=1e-3
    ),
    model=c.Wukong(layers=4, fmb_units=16, lcb_units=16, rank=16, mlp=(1024, 1024), head=(512,)),
    optimizer=c.Optimizer(clip_norm=1.0),
    train=c.Train(dtype="bfloat16"),
  )


def elements(params) -> int:
  """Of kernels that are sharded."""
  return sum(x.size for x in jax.tree.leaves(params) if placement.sharded(x.sharding.spec))


def main(dump: str, mesh: str) -> None:
  data, model = map(int, mesh.split("x"))
  # Five billion rows divide among 64 GPUs, not among 8: XLA overlaps nothing in a program that
  # does not fit into memory.
  wide = model == 64
  config, features = (
    get_config("bfloat16" if wide else "float32"),
    get_features(5_000_000_000 if wide else 50_000_017),
  )
  topology = target.parse_topology("h100:16x8")
  step = plan_training(config, features, topology, (data, model))
  stacks = {s.name: s for s in step.trainer.tables.layout.stacks}
  rows = {s.rows for s in stacks.values() if s.rows > 1000}
  rows |= {s.rows // model for s in stacks.values() if s.placement == "row"}
  print(
    json.dumps(
      {
        "stacks": {name: [s.rows, s.width, s.placement] for name, s in stacks.items()},
        "capacity": step.trainer.tables.capacity,
        "sharded_kernel_elements": elements(step.trainer.abstract().params),
        "scanned_kernel_elements": elements(step.trainer.abstract().params["model"]["layers"]),
        "collectives": [
          {
            "kind": x.kind, "axes": list(x.axes), "bytes": x.bytes, "async": x.async_,
            "dynamic": x.dynamic, "matmuls": x.matmuls, "trips": x.trips, "op_name": x.op_name,
          }
          for x in step.compiled.collectives
        ],
        "memory": step.compiled.memory._asdict(),
        "budget": step.budget._asdict(),
        "figures": report.figures(step, topology),
        "buffers": [str(b) for b in memory.buffers_like(step.compiled.text, rows)],
        "allocated": [
          str(v) for v in memory.allocated_like(memory.allocations(dump, "jit_training_step"), rows)
        ],
        "cas": ptx.cas_loops(dump, "jit_training_step"),
      }
    )
  )  # fmt: skip


if __name__ == "__main__":
  main(*sys.argv[1:])
