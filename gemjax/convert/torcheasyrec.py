"""Names of WuKong in TorchEasyRec, whose checkpoints are folders of torch.distributed.checkpoint.

The config must say what its pipeline says; its layers must be alike:

  lcb_feature_num, fmb_feature_num            lcb_units, fmb_units
  compressed_feature_num, feature_num_mlp     rank, mlp
  final                                       head
  dense_mlp, its last width that of a unit    embedding.dense_mlp without it, dense_relu
  always                                      norm_eps = 1e-5

without batch norm in its MLPs, and the data its ids and the order of its sparse group. Names are
those of the model, with anything in front; tables are called FEATURE_emb, as by default.
Source: tzrec/models/wukong.py and tzrec/modules of alibaba/TorchEasyRec.
"""

from __future__ import annotations

from gemjax import config as config_lib
from gemjax.convert.fuxictr import check_units, norm, wukong_layers
from gemjax.convert.names import Entry, same, transposed
from gemjax.convert.tensors import ConvertError
from gemjax.train.state import Trainer

GROUP = "embedding_group.emb_impls.__BASE__.ebc.embedding_bags"


def entries(trainer: Trainer, names: list[str]) -> list[Entry]:
  """The table; raises ConvertError where the config is none of its models."""
  model, emb = trainer.config.model, trainer.config.embedding
  if not isinstance(model, config_lib.Wukong) or model.fm != "optimised":
    raise ConvertError("torcheasyrec has WuKong with the optimised fm alone; mend config.model")
  for field, wanted in (
    ("fmb_relu", False), ("residual_bias", False), ("head_norm", "none"), ("norm_eps", 1e-5),
  ):  # fmt: skip
    if getattr(model, field) != wanted:
      raise ConvertError(
        f"config.model.{field} is {getattr(model, field)!r}, but TorchEasyRec's has {wanted!r}"
      )
  if trainer.features.dense and (not emb.dense_relu or emb.dense_units != 1):
    raise ConvertError(
      "TorchEasyRec's dense features are one unit with a ReLU: set config.embedding.dense_relu "
      "and dense_units 1"
    )
  check_units(trainer, "TorchEasyRec's WuKong")
  front = next((n.split("embedding_group.")[0] for n in names if "embedding_group." in n), "")
  table = [
    same(f"tables.{s.table}.rows", f"{GROUP}.{s.table}_emb.weight")
    for s in trainer.features.sparse
    if s.table in trainer.tables.layout.tables
  ]
  if trainer.features.dense:
    for i in range(len(emb.dense_mlp) + 1):
      table += _perceptron(f"inputs.dense.layers.{i}", f"dense_mlp.mlp.{i}.perceptron.0")
  for i, ours in enumerate(wukong_layers(trainer)):
    theirs = f"_wukong_layers.{i}"
    table.append(same(f"{ours}.compress.kernel_NL", f"{theirs}.lcb.weight"))
    table.append(same(f"{ours}.fm.y_NK", f"{theirs}.fmb.weight"))
    table += norm(f"{ours}.fm_norm", f"{theirs}.fmb.norm")
    for j in range(len(model.mlp)):
      table += _perceptron(f"{ours}.mlp.layers.{j}", f"{theirs}.fmb.mlp.mlp.{j}.perceptron.0")
    last = f"{ours}.mlp.layers.{len(model.mlp)}"
    table += _perceptron(last, f"{theirs}.fmb.feature_out_liner")
    table += norm(f"{ours}.norm", f"{theirs}.norm")
    if ours == "model.first":
      residual = f"{theirs}.residual_projection.weight"
      table.append(same(f"{ours}.residual.kernel_NL", residual))
  head = "model.heads.heads.0.layers"
  for i in range(len(model.head)):
    table += _perceptron(f"{head}.{i}", f"final_mlp.mlp.{i}.perceptron.0")
  table += _perceptron(f"{head}.{len(model.head)}", "output_mlp")
  return [entry._replace(theirs=tuple(front + n for n in entry.theirs)) for entry in table]


def _perceptron(ours: str, theirs: str) -> list[Entry]:
  kernel = transposed(f"{ours}.kernel", f"{theirs}.weight")
  return [kernel, same(f"{ours}.bias", f"{theirs}.bias")]
