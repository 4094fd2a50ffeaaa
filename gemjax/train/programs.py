"""The compiled programs of a run, made when they are first needed."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from gemjax import metrics
from gemjax.embedding import Plans
from gemjax.features import Batch
from gemjax.parallel.arrays import to_devices, to_host
from gemjax.train.compiled import Compiled
from gemjax.train.cost import jagged_flops
from gemjax.train.flops import matmul_flops
from gemjax.train.profile import Profile
from gemjax.train.state import Trainer, TrainState
from gemjax.train.step import (
  Report,
  average_step,
  bucket_step,
  plan_step,
  predict_step,
  train_step,
)  # fmt: skip


class Programs:
  """Of one trainer. The capacity of the exchange of rows is that of the first batch of training, if
  the config names none, and of evaluation: a larger batch later takes more rounds.
  """

  def __init__(self, trainer: Trainer, folder: pathlib.Path | None = None):
    """With a folder, steps are profiled into it where the config asks for it."""
    self._trainer = trainer
    steps = trainer.config.train.profile_steps
    self._profile = Profile(folder, steps) if folder and steps else None
    self._shardings = trainer.shardings
    self._step: Compiled | None = None
    self._predict: Compiled | None = None
    self._average = jax.jit(
      functools.partial(average_step, trainer), donate_argnums=0, out_shardings=self._shardings
    )

  @property
  def compile_seconds(self) -> float:
    return sum(p.seconds for p in (self._step, self._predict) if p is not None)

  def plan(self, batch: Batch) -> Plans:
    """The plans of a batch that follows no step; the first call measures it."""
    if self._step is None:
      self._trainer = measured(self._trainer, batch)
      self._step = Compiled(
        functools.partial(train_step, self._trainer),
        donate=(0,),
        out_shardings=(self._shardings, None, None),
      )
    return jax.jit(functools.partial(plan_step, self._trainer))(batch)

  def step(
    self, state: TrainState, plans: Plans, batch: Batch, upcoming: Batch
  ) -> tuple[TrainState, Plans, Report]:
    """`train_step`; the state is overwritten."""
    if self._profile is None:
      return self._step(state, plans, batch, upcoming)
    self._profile.before(state)
    result = self._step(state, plans, batch, upcoming)
    self._profile.after(result)
    return result

  def average(self, state: TrainState) -> TrainState:
    """`average_step`; the state is overwritten."""
    return self._average(state)

  def no_sums(self) -> metrics.MetricSums:
    """Of a new window of training metrics."""
    # Made where it lies: a device_put over several processes cannot be saved.
    tasks = len(self._trainer.features.tasks)
    return jax.jit(lambda: metrics.zeros(tasks), out_shardings=self._shardings.sums)()

  def predict(self, state: TrainState, batch: Batch) -> np.ndarray:
    """logits_BT of this process' rows."""
    batch = to_devices(self._trainer.mesh, batch)
    if self._predict is None:
      trainer = dataclasses.replace(
        self._trainer, tables=dataclasses.replace(self._trainer.tables, capacity={})
      )
      self._predict = Compiled(functools.partial(predict_step, measured(trainer, batch)))
    return to_host(self._predict(state, batch))

  def flops(self, state: TrainState, batch: Batch) -> float:
    """Of the matrix products of one training step with the events of `batch`."""
    plans = jax.eval_shape(functools.partial(plan_step, self._trainer), batch)
    step = functools.partial(train_step, self._trainer)
    lengths = {name: to_host(events.lengths_B) for name, events in batch.histories.items()}
    share = jax.process_count()  # Every process sees its rows.
    jagged = jagged_flops(self._trainer.config, lengths) * share
    return matmul_flops(step, state, plans, batch, batch) + jagged


def measured(trainer: Trainer, batch: Any) -> Trainer:
  """With room for what the devices ask of each other in `batch`, a global array."""
  if trainer.tables.measured:
    return trainer
  sizes = jax.device_get(jax.jit(functools.partial(bucket_step, trainer))(batch))
  tables = trainer.tables.with_capacity({name: int(size) for name, size in sizes.items()})
  return dataclasses.replace(trainer, tables=tables)
