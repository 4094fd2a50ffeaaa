"""A ranker: the units' input and one of the interaction models, built from a config."""

from __future__ import annotations

import jax
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key, fold
from gemjax.layers.units import UnitInput
from gemjax.models.dcnv2 import Dcnv2
from gemjax.models.dlrm import Dlrm
from gemjax.models.fm import Fm
from gemjax.models.logistic import Logistic
from gemjax.models.mlp import MlpRanker
from gemjax.models.wukong import Wukong

MODELS = {
  config_lib.Wukong: Wukong,
  config_lib.Logistic: Logistic,
  config_lib.Fm: Fm,
  config_lib.Dlrm: Dlrm,
  config_lib.Dcnv2: Dcnv2,
  config_lib.Mlp: MlpRanker,
}
LINEAR = (config_lib.Logistic, config_lib.Fm)


class Ranker(nnx.Module):
  """(units_BND, small_BSW, dense_BF) -> logits_BT; with a key an example it drops out."""

  def __init__(
    self,
    config: config_lib.Config,
    *,
    units: int,
    small: int,
    dense: int,
    tasks: int,
    rngs: nnx.Rngs,
  ):
    emb, dtype = config.embedding, config.train.dtype
    self.inputs = UnitInput(
      dim=emb.dim,
      units=units,
      dense=dense,
      # A linear model stays linear in its dense features.
      dense_mlp=() if isinstance(config.model, LINEAR) else emb.dense_mlp,
      dense_units=emb.dense_units,
      small=small,
      small_dim=emb.small_dim,
      small_group=emb.small_group,
      feature_dropout=config.model.feature_dropout,
      dtype=dtype,
      rngs=rngs,
    )
    self.model = MODELS[type(config.model)](
      config.model, units=self.inputs.units, dim=emb.dim, tasks=tasks, dtype=dtype, rngs=rngs
    )

  def __call__(
    self, units_BND: jax.Array, small_BSW: jax.Array, dense_BF: jax.Array, key_B: Key = None
  ) -> jax.Array:
    x_BND = self.inputs(units_BND, small_BSW, dense_BF, fold(key_B, 0))
    return self.model(x_BND, fold(key_B, 1))
