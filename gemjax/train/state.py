"""The training state and the static things that a step is made of."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemjax import config as config_lib
from gemjax import metrics
from gemjax.embedding import Stack, StackRule, TableLayout, assemble, layout_tables
from gemjax.features import FeatureSet
from gemjax.models import Ranker
from gemjax.train.optimizer import dense_optimizer, schedule

NEVER = 2**31 - 1


class TrainState(NamedTuple):
  """All that training changes; a plain pytree, donated to every step."""

  step: jax.Array  # int32, steps done.
  params: dict[str, Any]  # Dense parameters.
  opt_state: optax.OptState
  stacks: dict[int, Stack]  # Embedding tables by width.
  sums: metrics.MetricSums  # Since the last evaluation.
  bad_step: dict[str, jax.Array]  # Part -> first step at which it was not finite, or NEVER.


@dataclasses.dataclass(frozen=True, slots=True)
class Trainer:
  """The static side of a step: how to read the state and how to change it."""

  config: config_lib.Config
  features: FeatureSet
  layout: TableLayout
  rule: StackRule
  graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  share: optax.Schedule

  def predict(self, params, rows, batch, key=None) -> jax.Array:
    """logits_BT of a batch from its looked-up rows; with a key it drops out."""
    units_BND, small_BSW = assemble(self.layout, rows, batch)
    return nnx.merge(self.graph, params)(units_BND, small_BSW, batch.dense_BF, key)


def make_trainer(config: config_lib.Config, features: FeatureSet, steps: int) -> Trainer:
  """Raises ConfigError where the config does not fit the features."""
  for task in config.train.task_weights:
    if task not in features.tasks:
      raise config_lib.ConfigError(
        f"config.train.task_weights names {task!r}, but the tasks are {list(features.tasks)}"
      )
  if config.train.stop_metric == "gauc" and not features.grouped:
    raise config_lib.ConfigError(
      "config.train.stop_metric is 'gauc', but the data names no user; choose auc, ne or log_loss"
    )
  layout = layout_tables(features, config.embedding)
  graph, _ = nnx.split(nnx.eval_shape(lambda: _ranker(config, features, layout, 0)))
  return Trainer(
    config=config,
    features=features,
    layout=layout,
    rule=StackRule.from_config(config.embedding),
    graph=graph,
    optimizer=dense_optimizer(config.optimizer, steps),
    share=schedule(config.optimizer, steps),
  )


def init_state(trainer: Trainer, seed: int) -> TrainState:
  """The state before the first step; jit it, so that tables are born on the device."""
  model = _ranker(trainer.config, trainer.features, trainer.layout, seed)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(trainer.layout.rows))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=trainer.optimizer.init(params),
    stacks={w: trainer.rule.init(k, r, w) for k, (w, r) in zip(keys, trainer.layout.rows)},
    sums=metrics.zeros(len(trainer.features.tasks)),
    bad_step={part: jnp.full((), NEVER, jnp.int32) for part in parts(params, trainer.layout)},
  )


def parts(params: dict[str, Any], layout: TableLayout) -> list[str]:
  """Names of what the step checks for non-finite values."""
  dense = [f"gradient of {a}.{b}" for a in params for b in params[a]]
  return ["loss", *dense, *(f"gradient of tables of width {w}" for w, _ in layout.rows)]


def parameter_counts(state: TrainState) -> dict[str, int]:
  """Weights by kind; optimiser state not counted."""
  return {
    "dense": sum(p.size for p in jax.tree.leaves(state.params)),
    "embedding": sum(s.rows_RW.size for s in state.stacks.values()),
  }


def not_finite(state: TrainState) -> list[str]:
  """Paths of the arrays that hold a value that is not finite."""
  tree = {n: getattr(state, n) for n in ("params", "opt_state", "stacks")}
  finite = jax.device_get(_finite(tree))
  return [
    jax.tree_util.keystr(p) for p, ok in jax.tree_util.tree_leaves_with_path(finite) if not ok
  ]


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _ranker(config, features: FeatureSet, layout: TableLayout, seed: int) -> Ranker:
  wide = [p.units for p in (*layout.sparse, *layout.sequence) if not p.small]
  return Ranker(
    config,
    units=sum(wide),
    small=sum(p.small for p in layout.sparse),
    dense=len(features.dense),
    tasks=len(features.tasks),
    rngs=nnx.Rngs(seed),
  )
