"""The Wukong of suites `train_step` and `bfloat16`: the very model and optimisers of the peer."""

from __future__ import annotations

import jax
import numpy as np
from benchmarks import pytorch_wukong as peer
from benchmarks.turns import jitted_step

from gemjax.config import Config, Embedding, Optimizer, Train, Wukong
from gemjax.features import Batch, FeatureSet, Sparse
from gemjax.train.state import Trainer, TrainState, make_trainer


def wukong(rows: int, dtype: str = "float32"):
  """Trainer, fresh state and jitted step of the peer's model, optimisers and warm-up, computing in
  `dtype`.
  """
  features = FeatureSet(
    sparse=tuple(
      Sparse(name=f"c{i}", table=f"c{i}", size=per_field(rows)) for i in range(peer.FIELDS)
    )
  )
  config = Config(
    name="benchmark",
    embedding=Embedding(dim=peer.DIM, learning_rate=peer.TABLE_RATE, eps=peer.EPS),
    model=Wukong(
      layers=peer.LAYERS,
      fmb_units=peer.FMB_UNITS,
      lcb_units=peer.LCB_UNITS,
      rank=peer.RANK,
      mlp=peer.MLP,
      head=peer.HEAD,
    ),
    optimizer=Optimizer(learning_rate=peer.DENSE_RATE, warmup=0.1),
    train=Train(dtype=dtype),
  )
  trainer = make_trainer(config, features, steps=10 * peer.WARMUP)

  return trainer, trainer.born(), jitted_step(trainer)


def random_batch(rng: np.random.Generator, rows: int) -> Batch:
  """Uniform ids, labels of noise."""
  size = peer.BATCH
  return Batch(
    dense_BF=np.zeros((size, 0), np.float32),
    ids_BS=rng.integers(0, per_field(rows), (size, peer.FIELDS)).astype(np.int32),
    label_BT=(rng.random((size, 1)) < 0.3).astype(np.float32),
    weight_B=np.ones(size, np.float32),
    group_B=np.full(size, -1, np.int32),
    oracle_BT=np.zeros((size, 0), np.float32),
    sequences={},
  )


def torch_weights(trainer: Trainer, state: TrainState) -> dict[str, np.ndarray]:
  """The weights of the benchmark's Wukong under the names of the peer's `state_dict`."""
  model = jax.tree.map(np.asarray, state.params["model"])
  out = {"table.weight": _rows(trainer, state)}

  def put_mlp(name, tree):
    for i, layer in tree["layers"].items():
      out[f"{name}.{2 * i}.weight"] = layer["kernel"].T  # A ReLU sits between two layers.
      out[f"{name}.{2 * i}.bias"] = layer["bias"]

  layers = [model["first"]]
  for i in range(peer.LAYERS - 1):
    layers.append(jax.tree.map(lambda w, i=i: w[i], model["layers"]))
  for i, layer in enumerate(layers):
    name = f"layers.{i}"
    out[f"{name}.y_KN"] = layer["fm"]["y_NK"].T
    out[f"{name}.compress_LN"] = layer["compress"]["kernel_NL"].T
    if layer.get("residual"):
      out[f"{name}.residual_ON"] = layer["residual"]["kernel_NL"].T
    for norm in ("fm_norm", "norm"):
      out[f"{name}.{norm}.weight"] = layer[norm]["scale"]
      out[f"{name}.{norm}.bias"] = layer[norm]["bias"]
    put_mlp(f"{name}.mlp", layer["mlp"])
  put_mlp("head", model["heads"]["heads"][0])
  return out


def _rows(trainer: Trainer, state: TrainState) -> np.ndarray:
  """The tables one behind the other."""
  (stack,) = trainer.tables.layout.stacks
  count = per_field(peer.ROWS) * peer.FIELDS
  position_R = np.arange(count) * stack.multiplier % stack.rows
  return np.asarray(state.stacks[stack.name].rows_RW)[position_R]


def per_field(rows: int) -> int:
  """Rows of a field's table."""
  return rows // peer.FIELDS
