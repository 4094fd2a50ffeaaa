"""Names of HSTU in generative-recommenders' public experiments, saved by its research/trainer.

The config is of launch/next_item.py and must say what the .gin file says:

  max_sequence_length                     length
  max_sequence_length + gr_output_length + 1, which is 11 more by default      tower.places
  hstu_encoder.num_blocks, num_heads      tower.layers, tower.attention.heads
  item_embedding_dim, dropout_rate        tower.dim, tower.dropout
  temperature, num_negatives              tower.temperature, tower.negatives
  always     own_ids = True, tower.cell = "public_hstu", tower.score = "cosine"

dqk and dv must be dim / heads, linear_dropout_rate dropout_rate, user_embedding_norm "l2_norm",
item_l2_norm True and interaction_module_type "DotProduct", as in all its configs of HSTU. The data
must have its ids. Its softmax draws negatives for every event and with
repetition, so that training goes on with another loss than there; what a model says is the same.
Source: generative_recommenders/research of facebookresearch/generative-recommenders.
"""

from __future__ import annotations

import numpy as np

from gemjax.config.next_item import NextItem
from gemjax.convert.names import Entry, same, transposed
from gemjax.convert.tensors import ConvertError, Tensors, of_array

ITEMS = "_embedding_module._item_emb.weight"
MASK = "_attn_mask"  # True where a key lies after a query.


def entries(config: NextItem) -> list[Entry]:
  """The table, ours by their paths in a tower; raises ConvertError where the config is no HSTU of
  theirs.
  """
  tower = config.tower
  for field, value, wanted in (
    ("own_ids", config.own_ids, True),
    ("tower.cell", tower.cell, "public_hstu"),
    ("tower.score", tower.score, "cosine"),
  ):
    if value != wanted:
      raise ConvertError(f"config.{field} is {value!r}, but generative-recommenders has {wanted!r}")
  table = [
    same("item_VD", ITEMS),
    same("place_LD", "_input_features_preproc._pos_emb.weight"),
  ]
  for i in range(tower.layers):
    ours, theirs = f"blocks.{i}", f"_hstu._attention_layers.{i}"
    table += [
      same(f"{ours}.uvqk.kernel", f"{theirs}._uvqk"),
      same(f"{ours}.time_N", f"{theirs}._rel_attn_bias._ts_w"),
      same(f"{ours}.position_P", f"{theirs}._rel_attn_bias._pos_w"),
      transposed(f"{ours}.out.kernel", f"{theirs}._o.weight"),
      same(f"{ours}.out.bias", f"{theirs}._o.bias"),
    ]
  return table


def without_mask(tensors: Tensors, config: NextItem, what: str) -> Tensors:
  """A file's tensors under the names of the model, whatever stood in front of them.

  Raises:
    ConvertError: they are not of a model, or of one with other places.
  """
  fronts = [name.removesuffix(ITEMS) for name in tensors if name.endswith(ITEMS)]
  if len(fronts) != 1:
    raise ConvertError(f"{what} has {len(fronts)} tensors named ..{ITEMS}, but must have one")
  named = {n.removeprefix(fronts[0]): t for n, t in tensors.items() if n.startswith(fronts[0])}
  mask = named.pop(MASK, None)
  if mask is not None and not np.array_equal(mask.whole(), _mask(config)):
    raise ConvertError(
      f"{what} has the {MASK} of {mask.shape[0]} places, but config.tower.places is "
      f"{_places(config)}"
    )
  return named


def with_mask(tensors: Tensors, config: NextItem) -> Tensors:
  """The state_dict of a model."""
  return {MASK: of_array(_mask(config))} | tensors


def _mask(config: NextItem) -> np.ndarray:
  return np.triu(np.ones((_places(config), _places(config)), bool), 1)


def _places(config: NextItem) -> int:
  return config.tower.places or config.length
