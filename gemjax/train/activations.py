"""Bytes that a step keeps for its backward pass, measured on shapes, and how they fit a budget."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gemjax import config as config_lib
from gemjax.config import ConfigError
from gemjax.embedding.lookup import positions
from gemjax.features import Batch, Events, FeatureSet, Jagged, event_capacity
from gemjax.layers.dropout import example_keys
from gemjax.layers.saved import bytes_saved
from gemjax.parallel.arrays import BATCH
from gemjax.train.losses import next_events
from gemjax.train.state import Trainer, make_trainer


def fit_budget(config: config_lib.Config, features: FeatureSet, mesh: Mesh) -> config_lib.Config:
  """The config with the fewest `memory.recomputed_layers` that keep to `memory.activation_budget`.

  Measured on the largest batch (`largest_batch`); without a budget the config is as it was.

  Raises:
    ConfigError: even with all layers recomputed more is needed.
  """
  budget = config.memory.activation_budget
  if not budget:
    return config
  with_layers = lambda count: dataclasses.replace(
    config, memory=dataclasses.replace(config.memory, recomputed_layers=count)
  )

  @functools.cache
  def needed(count: int) -> int:
    trainer = make_trainer(with_layers(count), features, 1, mesh)
    return activation_bytes(trainer, largest_batch(config, features, mesh.size))

  layers = config.model.layers + isinstance(config.model, config_lib.Gem)
  limit = budget * needed(0) if budget <= 1 else budget
  if needed(layers) > limit:
    raise ConfigError(
      f"config.memory.activation_budget is {budget:g}, {limit / 1e9:.3g} GB, but with all "
      f"{layers} layers recomputed a device keeps {needed(layers) / 1e9:.3g} GB of activations"
    )
  low, high = 0, layers  # The more are recomputed, the less is kept.
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if needed(middle) <= limit else (middle + 1, high)
  return with_layers(low)


def activation_bytes(trainer: Trainer, batch: Batch) -> int:
  """Bytes that a device keeps from the forward to the backward pass of a batch of these shapes.

  Parameters and looked-up rows are not among them; nothing is computed.
  """
  shards, found = trainer.mesh.size, []
  rows = {
    name: jax.ShapeDtypeStruct((shards * count, width), trainer.config.train.dtype)
    for name, (count, width) in look_ups(trainer, batch).items()
  }

  def on_device(params, rows, batch):
    key_B = example_keys(jax.random.key(0), 0, len(batch.weight_B))

    def told(params, rows, dense_BF):
      logits_BT, following = trainer.apply(params, rows, batch._replace(dense_BF=dense_BF), key_B)
      return logits_BT, next_events(following)

    found.append(bytes_saved(told, params, rows, batch.dense_BF))
    return 0

  measure = jax.shard_map(
    on_device,
    mesh=trainer.mesh,
    in_specs=(trainer.specs.params, BATCH, BATCH),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  jax.eval_shape(measure, trainer.abstract().params, rows, batch)
  return found[-1]


def look_ups(trainer: Trainer, batch: Batch) -> dict[str, tuple[int, int]]:
  """Stack -> (look-ups of one device, padding included, width of a row)."""
  shards = trainer.mesh.size
  part = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((x.shape[0] // shards, *x.shape[1:]), x.dtype), batch
  )
  layout = trainer.tables.layout
  found = jax.eval_shape(functools.partial(positions, layout), part)
  return {s.name: (found[s.name].size, s.width) for s in layout.stacks}


def largest_batch(config: config_lib.Config, features: FeatureSet, shards: int) -> Batch:
  """Shapes of a global batch whose sequences are all as long as allowed."""
  shape, examples = jax.ShapeDtypeStruct, config.data.batch_size
  word = (2,) if features.wide else ()
  id_type = jnp.uint32 if features.wide else jnp.int32
  per = examples // shards
  return Batch(
    dense_BF=shape((examples, len(features.dense)), jnp.float32),
    ids_BS=shape((examples, len(features.sparse), *word), id_type),
    label_BT=shape((examples, len(features.tasks)), jnp.float32),
    weight_B=shape((examples,), jnp.float32),
    group_B=shape((examples,), jnp.int32),
    oracle_BT=shape((examples, 0), jnp.float32),
    sequences={
      f.name: Jagged(
        values_E=shape((shards * event_capacity(per * f.max_length), *word), id_type),
        lengths_B=shape((examples,), jnp.int32),
      )
      for f in features.sequence
    },
    histories={
      f.name: Events(
        ids_EC=shape((events, len(f.columns), *word), id_type),
        age_E=shape((events,), jnp.int32),
        lengths_B=shape((examples,), jnp.int32),
      )
      for f in features.history
      for longest in [min(f.max_length, config.data.history or f.max_length)]
      for events in [shards * event_capacity(per * longest)]
    },
  )
