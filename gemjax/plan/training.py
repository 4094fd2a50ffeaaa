"""The very training step of a config, compiled for GPUs that are not here, and what it takes."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemjax import config as config_lib
from gemjax.config import DATA, MODEL
from gemjax.features import Batch, FeatureSet
from gemjax.parallel.arrays import BATCH
from gemjax.plan import target
from gemjax.plan.compile import Compiled, compile_for
from gemjax.plan.estimate import Estimate, estimate
from gemjax.plan.rates import RATES
from gemjax.train.activations import activation_bytes, fit_budget, largest_batch, look_ups
from gemjax.train.cost import jagged_flops
from gemjax.train.devices import shape_mesh
from gemjax.train.flops import matmul_flops
from gemjax.train.state import Trainer, make_trainer
from gemjax.train.step import look_up_step, plan_step, train_step

STEPS = 1000  # Of the schedule; the program does not depend on it.
# What collectives are said to take, in multiples of what they do: which makes the shortest step
# cannot be told beforehand. For the paper's Wukong on 128 H100s these made 82.8, 80.7, 77.0 and
# 81.8 ms, 1 made 85.6 and 6 made 97.5.
QUEUED = (1.5, 2, 3, 4)


class Budget(NamedTuple):
  """Bytes of one device while a step runs."""

  tables: int
  table_state: int  # Optimiser state and marks, a few numbers a row or a weight.
  dense: int  # This device's shard of the dense parameters.
  optimizer: int  # Their moments.
  batch: int  # This batch and the upcoming one.
  exchange: int  # Plans, and looked-up rows with their gradients.
  activations: int  # All other temporaries: activations, gathered kernels, buffers of collectives.

  @property
  def total(self) -> int:
    return sum(self)


class PlannedStep(NamedTuple):
  """A compiled training step."""

  trainer: Trainer
  compiled: Compiled
  budget: Budget
  estimate: Estimate
  model_flops: float  # Matrix FLOPs of a device that the model needs, nothing computed twice.
  kept_activations: int  # Bytes from the forward to the backward pass.


def plan_training(
  config: config_lib.Config,
  features: FeatureSet,
  topology: target.Topology,
  mesh: tuple[int, int] | None = None,
  profile: Path | None = None,
) -> PlannedStep:
  """Compiles the step for `topology`, in a process with the environment of `target`.

  The exchange has room for a batch in which all ids are different, and sequences for batches in
  which all are as long as allowed, unless the config says otherwise: the most that a step can take.

  Args:
    config: The experiment.
    features: Of its data.
    topology: The GPUs.
    mesh: (data, model); the rule of gemjax/parallel/mesh.py unless given.
    profile: A file for the estimated costs of all instructions, by which the step is then compiled
      again, so that XLA hides what it can; without it XLA goes by costs of its own. Of QUEUED, how
      long collectives are said to take, that which makes the shortest step.

  Raises:
    ConfigError: the mesh is not that of the GPUs, or the batch does not divide by them.
  """
  if mesh:
    config = dataclasses.replace(config, mesh=config_lib.Mesh(data=mesh[0], model=mesh[1]))
  data, model, _ = shape_mesh(config, features, topology.size, topology.target.memory_bytes)
  if data * model != topology.size:
    raise config_lib.ConfigError(
      f"mesh {data}x{model} has {data * model} devices, but the topology has {topology.size}"
    )
  if config.data.batch_size % topology.size:
    raise config_lib.ConfigError(
      f"config.data.batch_size is {config.data.batch_size}, but must divide by {topology.size} GPUs"
    )
  devices = Mesh(target.devices(topology).reshape(data, model), (DATA, MODEL))
  config = fit_budget(config, features, devices)
  trainer = make_trainer(config, features, STEPS, devices)
  batch = _abstract(devices, largest_batch(config, features, topology.size))
  if not trainer.tables.measured:
    trainer = dataclasses.replace(trainer, tables=_with_room(trainer, batch))
  state = trainer.abstract()
  ahead = jax.eval_shape(functools.partial(plan_step, trainer), batch)
  if config.embedding.lookup == "ahead":
    ahead = jax.eval_shape(functools.partial(look_up_step, trainer), state, ahead)
  ahead = _abstract(devices, ahead)

  def training_step(state, ahead, batch, upcoming):
    return train_step(trainer, state, ahead, batch, upcoming)

  jitted = jax.jit(training_step, donate_argnums=0, out_shardings=(trainer.shardings, None, None))
  compiled = compile_for(jitted, (state, ahead, batch, batch))
  kernel_flops = jagged_flops(config, _lengths(config, features)) / topology.size

  def estimated(compiled: Compiled) -> Estimate:
    rates = RATES[topology.target.name]
    return estimate(
      compiled.text, compiled.collectives, rates, topology.gpus_per_host, kernel_flops
    )

  if profile:
    compiled = best_scheduled(compiled, estimated, profile)
  looked_up = sum(count * width for count, width in look_ups(trainer, batch).values())
  rows = looked_up * jax.numpy.dtype(config.train.dtype).itemsize
  inside = 0 if ahead.owed else 2 * rows  # Of temporaries; rows ahead and what is owed are not.
  temporaries = compiled.memory.temporaries
  budget = Budget(
    tables=sum(_held(stack.rows_RW) for stack in state.stacks.values()),
    table_state=sum(_held((s.slots, s.marks_R, s.clock)) for s in state.stacks.values()),
    dense=_held(state.params),
    optimizer=_held(state.opt_state),
    batch=2 * _held(batch),
    exchange=2 * _held(ahead) + min(inside, temporaries),
    activations=max(0, temporaries - inside),
  )
  once = dataclasses.replace(config.memory, recomputed_layers=0, activation_budget=0.0)
  plain = make_trainer(dataclasses.replace(config, memory=once), features, STEPS, devices)
  plain = dataclasses.replace(plain, tables=trainer.tables)
  step_once = functools.partial(train_step, plain)
  traced = matmul_flops(step_once, state, ahead, batch, batch) / topology.size
  kept = activation_bytes(trainer, batch)
  found = estimated(compiled)
  return PlannedStep(trainer, compiled, budget, found, traced + kernel_flops, kept)


def _lengths(config: config_lib.Config, features: FeatureSet) -> dict[str, np.ndarray]:
  """History -> length_B of a batch in which all are as long as allowed."""
  longest = lambda f: min(f.max_length, config.data.history or f.max_length)
  return {f.name: np.full(config.data.batch_size, longest(f)) for f in features.history}


def best_scheduled(
  compiled: Compiled, estimated: Callable[[Compiled], Estimate], profile: Path
) -> Compiled:
  """Compiled again by the costs of its first schedule, which are written to `profile`."""
  first, best, least = estimated(compiled), compiled, float("inf")
  with tempfile.TemporaryDirectory() as folder:
    for queued in QUEUED:
      file = Path(folder, f"{queued}.pbtxt")  # XLA reads a file of a name once.
      file.write_text(first.profile(queued))
      again = compiled.scheduled_by(file)
      if (seconds := estimated(again).seconds) < least:
        best, least = again, seconds
        profile.write_text(first.profile(queued))
  return best


def _abstract(mesh: Mesh, tree: Any) -> Any:
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _with_room(trainer: Trainer, batch: Batch):
  model = trainer.mesh.shape[MODEL]
  return trainer.tables.with_capacity(
    {name: -(-count // model) for name, (count, _) in look_ups(trainer, batch).items()}
  )


def _held(tree: Any) -> int:
  """Bytes that a device holds of a tree of shapes with their shardings."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
