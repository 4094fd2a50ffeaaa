"""A small data set and its config; also a config file: --config=tests/convert/small.py:fuxictr."""

import dataclasses
import pathlib

import numpy as np

from gemjax import config as c
from gemjax.data.prepared import PreparedWriter
from gemjax.features import Dense, FeatureSet, Sparse

EXAMPLES = {"train": 640, "valid": 128, "test": 128}
SIZES = {"user": 90, "item": 70, "seen": 70, "hour": 26}
DENSE = ("price", "age")
DIM = 8

WUKONG = {"layers": 3, "fmb_units": 2, "lcb_units": 3, "rank": 2, "mlp": (8,), "head": (16, 12)}
PEERS = {
  "gemjax": (c.Wukong(**WUKONG), {}),
  "fuxictr": (
    c.Wukong(**WUKONG, fmb_relu=True, residual_bias=True, head_norm="batch", norm_eps=1e-5),
    {"dense_mlp": (), "dense_units": 2},
  ),
  "torcheasyrec": (
    c.Wukong(**WUKONG, norm_eps=1e-5),
    {"dense_mlp": (5,), "dense_relu": True},
  ),
}


def get_config(peer: str = "gemjax") -> c.Config:
  model, embedding = PEERS[peer]
  return c.Config(
    name=f"small_{peer}",
    data=c.Data(path="SET BY A FLAG", batch_size=64, eval_batch_size=128, window_blocks=2),
    mesh=c.Mesh(data=1, model=1),
    embedding=c.Embedding(dim=DIM, replicated_rows=30, **embedding),
    model=dataclasses.replace(model),
    train=c.Train(epochs=1, eval_every=1, log_every=5),
  )


def features(sizes: dict[str, int] = SIZES) -> FeatureSet:
  """`seen` shares the table of `item`; `hour` is small enough to be replicated."""
  return FeatureSet(
    dense=tuple(Dense(name=name) for name in DENSE),
    sparse=tuple(
      Sparse(name=name, size=size, table="item" if name == "seen" else name)
      for name, size in sizes.items()
    ),
    tasks=("click",),
  )


def columns(examples: int, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.integers(0, size, examples) for size in sizes.values()], 1).astype(np.int32)
  dense = rng.normal(size=(examples, len(DENSE))).astype(np.float32)
  chance = 1 / (1 + np.exp(-dense[:, 0] - 2 * (ids[:, 0] % 2) + 1))
  return {"dense": dense, "ids": ids, "label": (rng.random((examples, 1)) < chance[:, None])}


def write_data(path: pathlib.Path, sizes: dict[str, int] = SIZES, **finish) -> pathlib.Path:
  with PreparedWriter(path, block_size=64) as writer:
    for seed, (split, examples) in enumerate(EXAMPLES.items()):
      cols = columns(examples, seed, sizes)
      writer.add(split, cols | {"label": cols["label"].astype(np.uint8)})
    found = finish.pop("features", features(sizes))
    writer.finish(found, origin={"dataset": "small"}, **finish)
  return path
