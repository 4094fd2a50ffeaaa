"""The compiled programs of a run, made when they are first needed or ahead of it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gemjax import metrics
from gemjax.features import Batch
from gemjax.parallel.arrays import to_devices, to_host
from gemjax.train.compiled import Compiled
from gemjax.train.cost import jagged_flops
from gemjax.train.executables import Executables
from gemjax.train.flops import matmul_flops
from gemjax.train.profile import Profile, Ran
from gemjax.train.state import Trainer, TrainState, init_state
from gemjax.train.step import (
  Ahead,
  Report,
  average_step,
  bucket_step,
  look_up_step,
  plan_step,
  predict_step,
  settle_step,
  train_step,
)  # fmt: skip


class Programs:
  """Of one trainer. The capacity of the exchange of rows is that of the first batch of training, if
  the config names none, and of evaluation: a larger batch later takes more rounds.

  Args:
    trainer: What they are of.
    executables: Where they are kept for the next start, if anywhere.
    folder: Where steps are profiled into, if the config asks for it.
  """

  def __init__(
    self,
    trainer: Trainer,
    executables: Executables | None = None,
    folder: pathlib.Path | None = None,
  ):
    executables = executables or Executables()
    self._trainer, self._executables = trainer, executables
    steps = trainer.config.train.profile_steps
    self._profile = Profile(folder, steps) if folder and steps else None
    self._shardings = trainer.shardings
    self._seed = np.int32(trainer.config.train.seed)
    self._plan: Compiled | None = None
    self._look_up: Compiled | None = None
    self._settle: Compiled | None = None
    self._step: Compiled | None = None
    self._predict: Compiled | None = None
    self._born = Compiled(
      "born",
      functools.partial(init_state, trainer),
      executables,
      out_shardings=self._shardings,
    )
    self._average = Compiled(
      "average",
      functools.partial(average_step, trainer),
      executables,
      donate=(0,),
      out_shardings=self._shardings,
    )
    tasks = len(trainer.features.tasks)
    # Made where they lie: a device_put over several processes cannot be saved.
    self._no_sums = Compiled(
      "no_sums",
      lambda: metrics.zeros(tasks),
      executables,
      out_shardings=self._shardings.sums,
    )

  @property
  def compile_seconds(self) -> float:
    """Of tracing and compiling, or of loading what an earlier start has compiled."""
    of_batches = (self._plan, self._look_up, self._settle, self._step, self._predict)
    every = (self._born, *of_batches, self._average, self._no_sums)
    return sum(p.seconds for p in every if p is not None)

  @property
  def compilations(self) -> int:
    """How many programs of `step` there are by now, one for every shape of batches."""
    return self._step.compilations if self._step else 0

  @property
  def exchange(self) -> dict[str, Any]:
    """The room of the exchange of rows, once measured, and of which mesh it is."""
    tables, mesh = self._trainer.tables, self._trainer.mesh
    return {"mesh": dict(mesh.shape), "rows": tables.capacity}

  def measure(self, batch: Callable[[], Batch], before: dict[str, Any] | None = None) -> None:
    """Makes room for the exchange of a first batch, if its room depends on the batch; as much as
    there was `before`, on the same mesh: a run that goes on has the programs that it had.
    """
    if self._step is None:
      tables = self._trainer.tables
      if before and before["mesh"] == self.exchange["mesh"] and not tables.measured:
        tables = dataclasses.replace(tables, capacity=before["rows"])
        self._trainer = dataclasses.replace(self._trainer, tables=tables)
      if not tables.measured:
        self._trainer = measured(self._trainer, batch())
      kept = self._kept(self._trainer)
      self._plan = Compiled("plan", functools.partial(plan_step, self._trainer), kept, varying=(0,))
      if self._trainer.config.embedding.lookup == "ahead":
        look_up = functools.partial(look_up_step, self._trainer)
        self._look_up = Compiled("look_up", look_up, kept, varying=(1,))
        self._settle = Compiled(
          "settle",
          functools.partial(settle_step, self._trainer),
          kept,
          varying=(1,),
          donate=(0,),
          out_shardings=self._shardings,
        )
      self._step = Compiled(
        "step",
        functools.partial(train_step, self._trainer),
        kept,
        varying=(1, 2, 3),
        donate=(0,),
        out_shardings=(self._shardings, None, None),
      )

  def prepare(self, *batches: Batch) -> None:
    """Has `step` and what comes with it ready for batches of these shapes; once measured, nothing
    runs.
    """
    for batch in batches:
      self._prepare(batch)

  def _prepare(self, batch: Batch) -> None:
    self.measure(lambda: batch)
    ahead = _placed(self._plan.prepare((batch,), lambda: (batch,)).outputs, batch)
    if self._look_up:
      of_ahead = lambda: (self._trainer.abstract(), ahead)
      ahead = _placed(self._look_up.prepare((ahead,), of_ahead).outputs, batch)
      self._settle.prepare((ahead.owed,), lambda: (self._trainer.abstract(), ahead.owed))
    args = lambda: (self._trainer.abstract(), ahead, batch, batch)
    self._step.prepare((ahead, batch, batch), args)

  def prepare_to_predict(self, batch: Batch) -> None:
    """Has `predict` ready, and what else training needs."""
    batch = to_devices(self._trainer.mesh, batch)
    state = lambda: (self._trainer.abstract(), batch)
    self._predicting(batch).prepare((batch,), state)
    self._born.prepare((), lambda: (self._seed,))
    self._no_sums.prepare((), tuple)
    if self._trainer.tables.averaged:
      self._average.prepare((), lambda: (self._trainer.abstract(),))

  def born(self) -> TrainState:
    """The state before the first step, every array born where it lies."""
    return self._born(self._seed)

  def ahead(self, state: TrainState, batch: Batch) -> Ahead:
    """Of a batch that follows no step; the first call measures it."""
    self.measure(lambda: batch)
    ahead = self._plan(batch)
    return self._look_up(state, ahead) if self._look_up else ahead

  def step(
    self, state: TrainState, ahead: Ahead, batch: Batch, upcoming: Batch
  ) -> tuple[TrainState, Ahead, Report]:
    """`train_step`; the state is overwritten.

    n shapes of batches have n programs, and not one for every two that may follow each other: where
    the upcoming batch has another shape, programs of its own plan it and read its rows.
    """
    alone = _shapes(batch) != _shapes(upcoming)
    if self._settle and (alone or _shapes(ahead.owed) != _shapes(self._nothing(batch))):
      state, ahead = self.settle(state, ahead), ahead._replace(owed=self._plan(batch).owed)
    behind = self.ahead(state, upcoming) if alone else None
    state, ahead, report = self._stepped(state, ahead, batch, batch if alone else upcoming)
    return state, behind._replace(owed=ahead.owed) if alone else ahead, report

  def _nothing(self, batch: Batch) -> Any:
    """What is owed, in shapes, where it is an update of no row of `batch`."""
    return self._plan.prepare((batch,), lambda: (batch,)).outputs.owed

  def _stepped(self, state: TrainState, *args: Any) -> tuple[TrainState, Ahead, Report]:
    if self._profile is None:
      return self._step(state, *args)
    self._profile.before(state)
    result = self._step(state, *args)
    self._profile.after(result, lambda: self._ran(*args))
    return result

  def settle(self, state: TrainState, ahead: Ahead) -> TrainState:
    """`settle_step`, where anything can be owed; the state is overwritten."""
    return self._settle(state, ahead.owed) if self._settle else state

  def average(self, state: TrainState) -> TrainState:
    """`average_step`; the state is overwritten."""
    return self._average(state)

  def no_sums(self) -> metrics.MetricSums:
    """Of a new window of training metrics."""
    return self._no_sums()

  def predict(self, state: TrainState, batch: Batch) -> np.ndarray:
    """logits_BT of this process' rows."""
    batch = to_devices(self._trainer.mesh, batch)
    return to_host(self._predicting(batch)(state, batch))

  def flops(self, state: TrainState, batch: Batch) -> float:
    """Of the matrix products of one training step with the events of `batch`."""
    ahead = _placed(jax.eval_shape(self._plan.jitted, batch), batch)
    if self._look_up:
      ahead = _placed(jax.eval_shape(self._look_up.jitted, state, ahead), batch)
    return matmul_flops(self._step.jitted, state, ahead, batch, batch) + self._jagged_flops(batch)

  def _jagged_flops(self, batch: Batch) -> float:
    lengths = {name: to_host(events.lengths_B) for name, events in batch.histories.items()}
    # Every process sees its rows.
    return jagged_flops(self._trainer.config, lengths) * jax.process_count()

  def _ran(self, ahead: Ahead, batch: Batch, upcoming: Batch) -> Ran:
    program = self._step.prepare((ahead, batch, upcoming), tuple)
    mesh = self._trainer.mesh
    return Ran(
      text=program.call.as_text(),
      device=mesh.devices.flat[0].device_kind,
      mesh=dict(mesh.shape),
      gpus_per_host=jax.local_device_count(),
      kernel_flops=self._jagged_flops(batch) / mesh.size,
    )

  def _predicting(self, batch: Batch) -> Compiled:
    if self._predict is None:
      tables = dataclasses.replace(self._trainer.tables, capacity={})
      trainer = measured(dataclasses.replace(self._trainer, tables=tables), batch)
      self._predict = Compiled(
        "predict", functools.partial(predict_step, trainer), self._kept(trainer), varying=(1,)
      )
    return self._predict

  def _kept(self, trainer: Trainer) -> Executables:
    return self._executables.of(capacity=trainer.tables.capacity)


def measured(trainer: Trainer, batch: Any) -> Trainer:
  """With room for what the devices ask of each other in `batch`, a global array."""
  if trainer.tables.measured:
    return trainer
  sizes = jax.device_get(jax.jit(functools.partial(bucket_step, trainer))(batch))
  tables = trainer.tables.with_capacity({name: int(size) for name, size in sizes.items()})
  return dataclasses.replace(trainer, tables=tables)


def _shapes(tree: Any) -> list[tuple[int, ...]]:
  return [x.shape for x in jax.tree.leaves(tree)]


def _placed(ahead: Ahead, batch: Batch) -> Ahead:
  """What is known of a batch lies as it does."""
  at = batch.weight_B.sharding
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), ahead)
