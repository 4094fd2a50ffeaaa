"""The training state and the static things that a step is made of."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemjax import config as config_lib
from gemjax import metrics
from gemjax.config import DATA, MODEL
from gemjax.embedding import (
  ShardedTables,
  Stacks,
  TableLayout,
  assemble,
  candidate_units,
  layout_tables,
)
from gemjax.features import Batch, FeatureSet
from gemjax.layers.events import EventRows, HistorySpec
from gemjax.layers.next_event import Next, NextEvents
from gemjax.models import Ranker
from gemjax.parallel.mesh import make_mesh
from gemjax.parallel.placement import param_specs, state_specs
from gemjax.train.optimizer import dense_optimizer, schedule

NEVER = 2**31 - 1
MAX_DOMAINS = 64


class TrainState(NamedTuple):
  """All that training changes; a plain pytree, donated to every step."""

  step: jax.Array  # int32, steps done.
  seed: jax.Array  # int32, of all that is drawn: one program serves every seed.
  params: dict[str, Any]  # Dense parameters.
  opt_state: optax.OptState
  stacks: Stacks  # Embedding tables by stack.
  sums: metrics.MetricSums  # Since the last evaluation.
  bad_step: dict[str, jax.Array]  # Part -> first step at which it was not finite, or NEVER.


@dataclasses.dataclass(frozen=True, slots=True)
class Trainer:
  """The static side of a step: how to read the state, how to change it, where it lies."""

  config: config_lib.Config
  features: FeatureSet
  tables: ShardedTables
  graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  share: optax.Schedule
  mesh: Mesh
  specs: TrainState  # Of PartitionSpecs.

  def predict(self, params, rows, batch: Batch) -> jax.Array:
    """logits_BT of a batch from its looked-up rows."""
    return self.apply(params, rows, batch)[0]

  def apply(
    self, params, rows, batch: Batch, key_B=None
  ) -> tuple[jax.Array, tuple[NextEvents, ...]]:
    """(logits_BT, what its events say of those behind them); with keys it drops out."""
    looked = assemble(self.tables.layout, rows, batch)
    histories = {
      name: EventRows(looked.events_EFD[name], events.age_E, events.lengths_B)
      for name, events in batch.histories.items()
    }
    domain_B = None
    if (column := _domain(self.config, self.features)) is not None:
      domain_B = batch.ids_BS[:, column]
      domain_B = domain_B[..., 0].astype(jnp.int32) if self.features.wide else domain_B
    ranker = nnx.merge(self.graph, params)
    args = (looked.units_BND, looked.small_BSW, batch.dense_BF, key_B, histories, domain_B)
    logits_BT, following = ranker(*args), nnx.pop(ranker, Next)
    is_next = lambda x: isinstance(x, NextEvents)
    return logits_BT, tuple(jax.tree.leaves(following, is_leaf=is_next))

  @property
  def shardings(self) -> TrainState:
    """Where every array of the state lies."""
    return jax.tree.map(
      lambda spec: NamedSharding(self.mesh, spec),
      self.specs,
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )

  def born(self) -> TrainState:
    """The state before the first step, every array born where it lies."""
    born = jax.jit(functools.partial(init_state, self), out_shardings=self.shardings)
    return born(self.config.train.seed)

  def abstract(self) -> TrainState:
    """Shapes, types and places of the state; nothing is computed."""
    shapes = jax.eval_shape(functools.partial(init_state, self), self.config.train.seed)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    return jax.tree.map(place, shapes, self.shardings)


def make_trainer(
  config: config_lib.Config, features: FeatureSet, steps: int, mesh: Mesh | None = None
) -> Trainer:
  """On one device unless a mesh is given.

  Raises:
    ConfigError: the config does not fit the features or the mesh.
  """
  for task in config.train.task_weights:
    if task not in features.tasks:
      raise config_lib.ConfigError(
        f"config.train.task_weights names {task!r}, but the tasks are {list(features.tasks)}"
      )
  kept = max((h.max_length for h in features.history), default=config.data.history)
  if config.data.history > kept:
    raise config_lib.ConfigError(
      f"config.data.history is {config.data.history}, but the data keep {kept} events at most; "
      "lower it, or prepare them with a greater max_length"
    )
  if config.train.stop_metric == "gauc" and not features.grouped:
    raise config_lib.ConfigError(
      "config.train.stop_metric is 'gauc', but the data names no user; choose auc, ne or log_loss"
    )
  mesh = mesh or make_mesh(1, 1, jax.local_devices()[:1])
  layout = layout_tables(features, config.embedding)
  data, model = mesh.shape[DATA], mesh.shape[MODEL]
  tables = ShardedTables.on_mesh(layout, config.embedding, data, model)
  graph, weights = _abstract_ranker(json.dumps(config.to_json()), features)
  optimizer = dense_optimizer(config.optimizer, steps)
  params = nnx.to_pure_dict(weights)
  specs = param_specs(weights, mesh.shape)
  replicated = PartitionSpec()
  state = TrainState(
    step=replicated,
    seed=replicated,
    params=specs,
    opt_state=state_specs(optimizer, params, specs),
    stacks=tables.specs(),
    sums=jax.tree.map(lambda _: replicated, jax.eval_shape(lambda: metrics.zeros(1))),
    bad_step=dict.fromkeys(parts(params, layout), replicated),
  )
  return Trainer(
    config=config,
    features=features,
    tables=tables,
    graph=graph,
    optimizer=optimizer,
    share=schedule(config.optimizer, steps),
    mesh=mesh,
    specs=state,
  )


def state_bytes(config: config_lib.Config, features: FeatureSet) -> int:
  """Of parameters, tables and optimiser state, whole; nothing is computed."""
  layout = layout_tables(features, config.embedding)
  tables = ShardedTables(layout=layout, config=config.embedding, data=1, model=1)
  _, weights = _abstract_ranker(json.dumps(config.to_json()), features)
  params = nnx.to_pure_dict(weights)
  moments = jax.eval_shape(dense_optimizer(config.optimizer, 1).init, params)
  dense = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, moments)))
  return dense + tables.state_bytes()


def init_state(trainer: Trainer, seed: jax.Array | int) -> TrainState:
  """The state before the first step; equal on every mesh."""
  model = _ranker(trainer.config, trainer.features, trainer.tables.layout, seed)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tables = jax.shard_map(
    trainer.tables.init,
    mesh=trainer.mesh,
    in_specs=PartitionSpec(),
    out_specs=trainer.specs.stacks,
    check_vma=False,
  )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    seed=jnp.asarray(seed, jnp.int32),
    params=params,
    opt_state=trainer.optimizer.init(params),
    stacks=tables(table_key(seed)),
    sums=metrics.zeros(len(trainer.features.tasks)),
    bad_step={part: jnp.full((), NEVER, jnp.int32) for part in trainer.specs.bad_step},
  )


def table_key(seed: jax.Array | int) -> jax.Array:
  """Of what the rows of tables are born with."""
  return jax.random.fold_in(jax.random.key(seed), 1)


def parts(params: dict[str, Any], layout: TableLayout) -> list[str]:
  """Names of what the step checks for non-finite values."""
  dense = [f"gradient of {a}.{b}" for a in params for b in params[a]]
  return ["loss", *dense, *(f"gradient of tables {s.name}" for s in layout.stacks)]


def parameter_counts(trainer: Trainer, state: TrainState) -> dict[str, int]:
  """Weights by kind; neither optimiser state nor padding rows are counted."""
  layout, sizes = trainer.tables.layout, trainer.features.tables
  return {
    "dense": sum(p.size for p in jax.tree.leaves(state.params)),
    "embedding": sum(sizes[table] * layout.positions(table)[0].width for table in layout.tables),
  }


@functools.lru_cache(maxsize=1)  # The mesh's shape and the trainer ask for the same.
def _abstract_ranker(config_json: str, features: FeatureSet) -> tuple[nnx.GraphDef, nnx.State]:
  config = config_lib.Config.from_json(json.loads(config_json))
  layout = layout_tables(features, config.embedding)
  return nnx.split(nnx.eval_shape(lambda: _ranker(config, features, layout, config.train.seed)))


def _ranker(
  config: config_lib.Config, features: FeatureSet, layout: TableLayout, seed: jax.Array | int
) -> Ranker:
  wide = [p.units for p in (*layout.sparse, *layout.sequence) if not p.small]
  histories = []
  ages = config.embedding.ages
  for history in features.history:
    candidate = candidate_units(layout, history.name)
    length = min(history.max_length, config.data.history or history.max_length)
    histories.append(HistorySpec(history.name, len(candidate), length, candidate, ages))
  column = _domain(config, features)
  return Ranker(
    config,
    units=sum(wide),
    small=sum(p.small for p in layout.sparse),
    dense=len(features.dense),
    tasks=len(features.tasks),
    histories=tuple(histories),
    domains=0 if column is None else features.sparse[column].size,
    rngs=nnx.Rngs(jax.random.key(seed)),
  )


def _domain(config: config_lib.Config, features: FeatureSet) -> int | None:
  """The column of ids_BS that names an example's domain, if the model has domains."""
  name = getattr(config.model, "domain", "")
  if not name:
    return None
  for column, feature in enumerate(features.sparse):
    if feature.name == name:
      if feature.size > MAX_DOMAINS:
        raise config_lib.ConfigError(
          f"config.model.domain is {name!r} with {feature.size:,} rows, but every row bends "
          f"the heads; name a feature of at most {MAX_DOMAINS}"
        )
      return column
  raise config_lib.ConfigError(
    f"config.model.domain is {name!r}, but the sparse features are "
    f"{[f.name for f in features.sparse]}"
  )
