"""Names of WuKong in FuxiCTR's model zoo, whose checkpoints are `state_dict`s in files NAME.model.

The config must say what its hyperparameters say:

  num_wukong_layers, fmp_rank_k        layers, rank
  fmb_features, lcb_features           fmb_units, lcb_units
  fmb_mlp_units, mlp_hidden_units      mlp, head
  net_dropout, mlp_batch_norm          dropout, head_norm = "batch"
  always                               fmb_relu, residual_bias, norm_eps = 1e-5
  numeric features                     embedding.dense_mlp = (), dense_units = their number

and the data must have its features in its order, numeric ones first, with its ids.
Source: model_zoo/WuKong/src/WuKong.py and fuxictr/pytorch/layers of reczoo/FuxiCTR.
"""

from __future__ import annotations

import numpy as np

from gemjax import config as config_lib
from gemjax.convert.names import Entry, Form, same, transposed
from gemjax.convert.tensors import ConvertError
from gemjax.train.state import Trainer

EMBEDDINGS = "embedding_layer.embedding_layer.embedding_layers"


def counters(trainer: Trainer) -> list[str]:
  """Names of the numbers of steps that batch norm has counted; nothing reads them where its
  momentum is a number.
  """
  model = trainer.config.model
  batch = getattr(model, "head_norm", "none") == "batch"
  return [f"fc.mlp.{3 * i + 1}.num_batches_tracked" for i in range(len(model.head) * batch)]


def entries(trainer: Trainer, names: list[str]) -> list[Entry]:
  """The table; raises ConvertError where the config is none of its models."""
  del names
  config = trainer.config
  model = config.model
  if not isinstance(model, config_lib.Wukong) or model.fm == "attentive":
    raise ConvertError(
      "fuxictr has WuKong alone: config.model must be Wukong, its fm not attentive"
    )
  for field, wanted in (("fmb_relu", True), ("residual_bias", True), ("norm_eps", 1e-5)):
    if getattr(model, field) != wanted:
      raise ConvertError(
        f"config.model.{field} is {getattr(model, field)!r}, but FuxiCTR's WuKong has {wanted!r}"
      )
  check_units(trainer, "FuxiCTR's WuKong")
  table = [
    same(f"tables.{s.table}.rows", f"{EMBEDDINGS}.{s.name}.weight")
    for s in trainer.features.sparse
    if s.table in trainer.tables.layout.tables
  ]
  names = [f"{EMBEDDINGS}.{d.name}.weight" for d in trainer.features.dense]
  table = _numeric(config, names) + table
  drop = 1 if model.dropout else 0
  for i, ours in enumerate(wukong_layers(trainer)):
    theirs = f"wukong_stack.{i}"
    if model.fm == "optimised":
      table.append(same(f"{ours}.fm.y_NK", f"{theirs}.fmb.proj_Y"))
    table += norm(f"{ours}.fm_norm", f"{theirs}.fmb.layer_norm")
    table += _mlp(f"{ours}.mlp", f"{theirs}.fmb.mlp.mlp", len(model.mlp), 2 + drop)
    table.append(transposed(f"{ours}.compress.kernel_NL", f"{theirs}.lcb.linear.weight"))
    table += norm(f"{ours}.norm", f"{theirs}.layer_norm")
    if i == 0 and trainer.abstract().params["model"].get("first"):
      table.append(transposed(f"{ours}.residual.kernel_NL", f"{theirs}.residual_proj.weight"))
      table.append(same(f"{ours}.residual.bias_L", f"{theirs}.residual_proj.bias"))
  head, batch = "model.heads.heads.0", model.head_norm == "batch"
  table += _mlp(head, "fc.mlp", len(model.head), 3 if batch else 2)
  for i in range(len(model.head) if batch else 0):
    for ours, theirs in (
      ("scale", "weight"),
      ("bias", "bias"),
      ("mean", "running_mean"),
      ("variance", "running_var"),
    ):
      table.append(same(f"{head}.norms.{i}.{ours}", f"fc.mlp.{3 * i + 1}.{theirs}"))
  return table


def check_units(trainer: Trainer, what: str) -> None:
  """Raises ConvertError unless every feature is one unit and there is one task."""
  layout = trainer.tables.layout
  if len(trainer.features.tasks) != 1:
    raise ConvertError(f"{what} has one task, but the data have {list(trainer.features.tasks)}")
  if trainer.features.sequence or trainer.features.history:
    raise ConvertError(f"{what} as read here has no sequences, but the data have some")
  if wide := [p.feature for p in layout.sparse if p.units != 1]:
    raise ConvertError(
      f"{what} has one unit for every feature, but config.embedding gives {wide[0]!r} another "
      f"number or keeps its table small (units, small_rows)"
    )


def wukong_layers(trainer: Trainer) -> list[str]:
  """Our names of the layers, in their order."""
  params, depth = trainer.abstract().params["model"], trainer.config.model.layers
  first = ["model.first"] if params.get("first") else []
  return first + [f"model.layers.{i}" for i in range(depth - len(first))]


def _numeric(config: config_lib.Config, names: list[str]) -> list[Entry]:
  """A feature's own row w (d, 1) of x w: together a linear map whose blocks off the diagonal and
  whose bias are zero.
  """
  if not names:
    return []
  emb, count = config.embedding, len(names)
  if emb.dense_mlp or emb.dense_units != count or emb.dense_relu:
    raise ConvertError(
      "FuxiCTR has a linear unit for every numeric feature: config.embedding must have dense_mlp "
      f"() and dense_units {count}, and no dense_relu"
    )

  def to_ours(*weights: np.ndarray) -> np.ndarray:
    kernel = np.zeros((count, count, emb.dim), weights[0].dtype)
    for i, weight in enumerate(weights):
      kernel[i, i] = weight[:, 0]
    return kernel.reshape(count, count * emb.dim)

  def to_theirs(kernel: np.ndarray, i: int) -> np.ndarray:
    blocks = kernel.reshape(count, count, emb.dim)
    if blocks.any() and np.count_nonzero(blocks) != sum(
      np.count_nonzero(blocks[j, j]) for j in range(count)
    ):
      raise ConvertError(
        "the dense features' kernel mixes them, which FuxiCTR's numeric features cannot"
      )
    return blocks[i, i][:, None]

  def no_bias(bias: np.ndarray, i: int) -> np.ndarray:
    if bias.any():
      raise ConvertError(
        "the dense features have a bias, which FuxiCTR's numeric features have not"
      )
    return bias

  layer = "inputs.dense.layers.0"
  zeros = Form(lambda: np.zeros(count * emb.dim, np.float32), no_bias)
  return [
    Entry(f"{layer}.kernel", tuple(names), Form(to_ours, to_theirs)),
    Entry(f"{layer}.bias", (), zeros),
  ]


def norm(ours: str, theirs: str) -> list[Entry]:
  """Scale and bias of a layer norm."""
  return [same(f"{ours}.scale", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")]


def _mlp(ours: str, theirs: str, hidden: int, stride: int) -> list[Entry]:
  """Linear layers stand `stride` places apart in an nn.Sequential."""
  table = []
  for i in range(hidden + 1):
    table.append(transposed(f"{ours}.layers.{i}.kernel", f"{theirs}.{stride * i}.weight"))
    table.append(same(f"{ours}.layers.{i}.bias", f"{theirs}.{stride * i}.bias"))
  return table
