"""Trains a sharded TorchRec EmbeddingBagCollection on PROCESSES and saves it, or restores what a
conversion wrote: torchrec_sharded.py train|restore FOLDER PROCESSES.
"""

import os
import pathlib
import socket
import sys

SIZES = {"user": 90, "item": 70, "hour": 26}
DIM = 8


def collection():
  import torch
  from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

  torch.manual_seed(0)
  tables = [
    EmbeddingBagConfig(
      name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=[f"{name}_id"]
    )
    for name, rows in SIZES.items()
  ]
  return EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))


def sharded(world: int):
  """Rows of `user` are split, those of the others lie on one process each."""
  import torch
  from torch.distributed.optim import _apply_optimizer_in_backward
  from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
  from torchrec.distributed.model_parallel import DistributedModelParallel
  from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
    table_wise,
  )
  from torchrec.distributed.types import ShardingPlan
  from torchrec.optim import RowWiseAdagrad

  bags, sharder = collection(), EmbeddingBagCollectionSharder()
  _apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.1, "eps": 1e-8})
  plan = construct_module_sharding_plan(
    bags,
    {"user": row_wise(), "item": table_wise(rank=world - 1), "hour": table_wise(rank=0)},
    local_size=world, world_size=world, device_type="cpu", sharder=sharder,
  )  # fmt: skip
  return DistributedModelParallel(
    bags, device=torch.device("cpu"), plan=ShardingPlan({"": plan}), sharders=[sharder]
  )


def work(rank: int, world: int, port: int, what: str, folder: pathlib.Path) -> None:
  import torch
  import torch.distributed as dist
  import torch.distributed.checkpoint as dcp
  from torchrec import KeyedJaggedTensor

  os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
  dist.init_process_group("gloo")
  model = sharded(world)
  state = lambda: {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
  if what == "train":
    rng = torch.Generator().manual_seed(rank)
    for _ in range(4):
      ids = [torch.randint(rows, (16,), generator=rng) for rows in SIZES.values()]
      values = torch.cat(ids)
      bags = KeyedJaggedTensor(
        [f"{name}_id" for name in SIZES], values, lengths=torch.ones_like(values)
      )
      out = model(bags)
      (out.wait() if hasattr(out, "wait") else out).values().square().sum().backward()
    dcp.save(state(), checkpoint_id=folder / "trained")
  else:
    found = state()
    dcp.load(found, checkpoint_id=folder / "converted")
    model.load_state_dict(found["model"])
    model.fused_optimizer.load_state_dict(found["optimizer"])
    dcp.save(state(), checkpoint_id=folder / "restored")
  dist.destroy_process_group()


if __name__ == "__main__":
  import torch.multiprocessing as mp

  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  what, folder, world = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
  mp.spawn(work, args=(world, port, what, folder), nprocs=world)
