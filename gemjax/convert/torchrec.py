"""Names of the tables of TorchRec's EmbeddingBagCollection, with the state of row-wise AdaGrad.

  embedding_bags.TABLE.weight                             (rows, width)
  state.embedding_bags.TABLE.weight.TABLE.momentum1       (rows,) of a sharded one's optimiser
  state.TABLE.weight.TABLE.weight.momentum_1              (rows,) of a fused one's

with anything in front: "model.", "optimizer.", the modules around the collection. Files hold
{"model": state_dict, "optimizer": state_dict of the fused optimiser}, either alone, or are folders
of torch.distributed.checkpoint, in which tables may be sharded in any way. Tables have our tables'
names; dense parameters are neither read nor written.
Source: torchrec/modules/embedding_modules.py and torchrec/distributed/batched_embedding_kernel.py.
"""

from __future__ import annotations

from gemjax.convert.names import Entry, same
from gemjax.convert.tensors import ConvertError, Tensors
from gemjax.convert.torch_file import Tree
from gemjax.train.state import Trainer

MODEL, STATE = "model", "optimizer.state"


def entries(trainer: Trainer, names: list[str]) -> list[Entry]:
  """The table; of `names` those that end as above, or with none the names to write."""
  rowwise = trainer.config.embedding.optimizer == "rowwise_adagrad"
  table = []
  for name in trainer.tables.layout.tables:
    ends = {
      "rows": (f"embedding_bags.{name}.weight",),
      "v": (f"weight.{name}.momentum1", f".{name}.weight.momentum_1"),
    }
    if not names:
      weight = ends["rows"][0]
      found = {"rows": [f"{MODEL}.{weight}"], "v": [f"{STATE}.{weight}.{name}.momentum1"]}
    else:
      found = {kind: [n for n in names if n.endswith(end)] for kind, end in ends.items()}
    if len(found["rows"]) != 1:
      raise ConvertError(
        f"of table {name!r} there must be one tensor named ..embedding_bags.{name}.weight, but "
        f"there are {found['rows'] or 'none'}"
      )
    table.append(same(f"tables.{name}.rows", found["rows"][0]))
    if rowwise and found["v"]:
      table.append(same(f"tables.{name}.v", found["v"][0]))
  return table


def tree(tensors: Tensors) -> Tree:
  """{"model": .., "optimizer": {"state": {PARAMETER: {TABLE.momentum1: ..}}}}."""
  model: Tree = {}
  state: Tree = {}
  for name, tensor in tensors.items():
    if name.startswith(f"{STATE}."):
      parameter, slot = name.removeprefix(f"{STATE}.").rsplit(".weight.", 1)
      state.setdefault(f"{parameter}.weight", {})[slot] = tensor
    else:
      model[name.removeprefix(f"{MODEL}.")] = tensor
  return {"model": model, "optimizer": {"state": state}}
