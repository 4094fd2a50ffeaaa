"""A ranker: the units' input and one of the models, built from a config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key, fold
from gemjax.layers.events import EventRows, HistorySpec, pooled
from gemjax.layers.saved import Keeping
from gemjax.layers.units import UnitInput
from gemjax.models.dcnv2 import Dcnv2
from gemjax.models.din import Din
from gemjax.models.dlrm import Dlrm
from gemjax.models.fm import Fm
from gemjax.models.gem import Gem
from gemjax.models.interformer import InterFormer
from gemjax.models.logistic import Logistic
from gemjax.models.mlp import MlpRanker
from gemjax.models.sequence_ranker import SequenceRanker
from gemjax.models.wukong import Wukong

MODELS = {
  config_lib.Wukong: Wukong,
  config_lib.Logistic: Logistic,
  config_lib.Fm: Fm,
  config_lib.Dlrm: Dlrm,
  config_lib.Dcnv2: Dcnv2,
  config_lib.Mlp: MlpRanker,
  config_lib.Din: Din,
  config_lib.Sasrec: SequenceRanker,
  config_lib.Hstu: SequenceRanker,
  config_lib.InterFormer: InterFormer,
  config_lib.Gem: Gem,
}
LINEAR = (config_lib.Logistic, config_lib.Fm)
SEQUENTIAL = (Din, SequenceRanker, InterFormer, Gem)


def _check(model: config_lib.Model, histories: tuple[HistorySpec, ...]) -> None:
  """Raises ConfigError where a model would be blind to what it is for."""
  name = type(model).__name__
  reads, asks = isinstance(model, config_lib.InterFormer), False
  if isinstance(model, config_lib.Din | config_lib.Sasrec | config_lib.Hstu):
    reads = asks = True
  elif isinstance(model, config_lib.Gem):
    reads = model.strides or model.interest
    asks = model.interest or (model.strides and (model.target or model.next_event))
  if reads and not histories:
    raise config_lib.ConfigError(
      f"config.model is {name}, which reads histories, but the data have none; take Wukong, or "
      "prepare data with histories"
    )
  for history in histories if asks else ():
    if all(place < 0 for place in history.candidate):
      raise config_lib.ConfigError(
        f"config.model is {name}, which asks what the history {history.name!r} says of an example, "
        "but none of its columns shares a table with a feature; name one in the schema: table = .."
      )


class Ranker(nnx.Module):
  """(units_BND, small_BSW, dense_BF, histories, domain_B) -> logits_BT; with a key an example it
  drops out.

  A model that reads no histories gets the means over their events as further units (Wukong with
  pooled history); GEM gets both where its config says so.

  Args:
    units: N of the looked-up units.
    small: S of small tables.
    dense: F.
    tasks: T.
    histories: Of the data; `candidate` counts within `units_BND`.
    domains: Values of GEM's domain feature; 0 for none.
  """

  def __init__(
    self,
    config: config_lib.Config,
    *,
    units: int,
    small: int,
    dense: int,
    tasks: int,
    histories: tuple[HistorySpec, ...] = (),
    domains: int = 0,
    rngs: nnx.Rngs,
  ):
    emb, dtype, kind = config.embedding, config.train.dtype, MODELS[type(config.model)]
    _check(config.model, histories)
    self.pooled = kind not in SEQUENTIAL or getattr(config.model, "pooled", False)
    more = sum(h.units for h in histories) if self.pooled else 0
    lead = emb.dense_units if dense else 0  # UnitInput puts dense units in front.
    own = {}
    if kind in SEQUENTIAL:
      at = lambda place: place if place < 0 else place + lead
      own["histories"] = tuple(
        h._replace(candidate=tuple(at(place) for place in h.candidate)) for h in histories
      )
    if kind is Gem:
      own["domains"] = domains
    if kind in (Wukong, Gem):
      memory, lie = config.memory, config.compilation
      float8 = memory.activations == "float8"
      own["keeping"] = Keeping(float8, memory.recomputed_layers, lie.unroll, lie.early_sums)
      own["float8_mlp"] = config.train.float8_mlp
    self.inputs = UnitInput(
      dim=emb.dim,
      units=units + more,
      dense=dense,
      # A linear model stays linear in its dense features.
      dense_mlp=() if isinstance(config.model, LINEAR) else emb.dense_mlp,
      dense_units=emb.dense_units,
      dense_relu=emb.dense_relu,
      small=small,
      small_dim=emb.small_dim,
      small_group=emb.small_group,
      feature_dropout=config.model.feature_dropout,
      dtype=dtype,
      rngs=rngs,
    )
    self.model = kind(
      config.model,
      units=self.inputs.units,
      dim=emb.dim,
      tasks=tasks,
      dtype=dtype,
      rngs=rngs,
      **own,
    )

  def __call__(
    self,
    units_BND: jax.Array,
    small_BSW: jax.Array,
    dense_BF: jax.Array,
    key_B: Key = None,
    histories: dict[str, EventRows] | None = None,
    domain_B: jax.Array | None = None,
  ) -> jax.Array:
    histories = histories or {}
    if self.pooled and histories:
      # The order in which jit passes a dict, so that it is the same without.
      means = [pooled(histories[name]) for name in sorted(histories)]
      units_BND = jnp.concatenate([units_BND, *means], 1)
    x_BND = self.inputs(units_BND, small_BSW, dense_BF, fold(key_B, 0))
    args = (histories,) if isinstance(self.model, SEQUENTIAL) else ()
    more = {"domain_B": domain_B} if isinstance(self.model, Gem) else {}
    return self.model(x_BND, *args, fold(key_B, 1), **more)
