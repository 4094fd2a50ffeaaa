"""The training loop: resume, train, evaluate, save, stop, report."""

from __future__ import annotations

import functools
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from gemjax import config as config_lib
from gemjax import metrics
from gemjax.checkpoint import Checkpoints
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import PreparedData
from gemjax.train import summary as summary_lib
from gemjax.train.compiled import Compiled
from gemjax.train.evaluate import PredictionError, evaluate
from gemjax.train.flops import matmul_flops
from gemjax.train.progress import Phases, Progress
from gemjax.train.source import open_data
from gemjax.train.state import (
  NEVER,
  TrainState,
  init_state,
  make_trainer,
  not_finite,
  parameter_counts,
)  # fmt: skip
from gemjax.train.step import predict_step, train_step
from gemjax.train.stopping import BestSoFar
from gemjax.train.termination import Terminated, Termination
from gemjax.train.workdir import CHECKPOINTS, SUMMARY, Workdir, write_json


class NonFiniteError(RuntimeError):
  """Training met a value that is not finite."""


def train(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to the end and returns the summary; the same call resumes what was interrupted.

  Raises:
    ConfigError, PreparedDataError, WorkdirError: before any work.
    CheckpointError: a checkpoint cannot be read or written.
    NonFiniteError: with step, learning rate and part; the last checkpoint is from before.
    Terminated: SIGTERM came; a checkpoint of the last step is saved.
  """
  config.validate()
  phases = Phases()
  with Termination() as termination, Workdir(workdir) as folder:
    with phases("data"):
      data = open_data(config, folder.path)
      for split in ("train", "valid", "test"):
        data.split(split)
    return _Run(config, data, folder, phases, termination).run()


class _Run:
  """One run's parts; `run` is the order in which they act."""

  def __init__(
    self,
    config: config_lib.Config,
    data: PreparedData,
    folder: Workdir,
    phases: Phases,
    termination: Termination,
  ):
    examples, batch = data.split("train").examples, config.data.batch_size
    self.steps = config.train.steps or math.ceil(config.train.epochs * examples / batch)
    interval = max(1, round(config.train.eval_every * examples / batch))
    self.eval_interval = interval if config.train.eval_every else self.steps
    self.config, self.data, self.folder, self.phases = config, data, folder, phases
    self.termination = termination
    self.trainer = make_trainer(config, data.features, self.steps)
    self.step_fn = Compiled(functools.partial(train_step, self.trainer), donate=(0,))
    self.predict = Compiled(functools.partial(predict_step, self.trainer))
    self.init = functools.partial(init_state, self.trainer, config.train.seed)
    self.batches = iter(
      train_batches(
        data,
        batch_size=batch,
        seed=config.train.seed,
        window_blocks=config.data.window_blocks,
      )
    )
    # What can be refused has been refused: from here on the folder is this run's.
    self.checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=config.checkpoint.keep)
    digests = {name: split.digest for name, split in data.splits.items()}
    folder.claim(config, data.features, digests, begun=bool(self.checkpoints.steps))
    self.progress = Progress(folder.path, self.steps, batch)
    self.best = BestSoFar(metric=config.train.stop_metric)
    self.valid: dict[str, Any] = {}  # Results of the best evaluation.
    self.train_loss = math.nan  # Mean since the evaluation before.
    self.seconds = 0.0  # In steps, over all starts, without compilation.

  def run(self) -> dict[str, Any]:
    """Resume or begin, train, choose the best, test, report."""
    self.termination.deferred = True
    try:
      with self.phases("state"):
        state = self._resume() if self.checkpoints.steps else jax.jit(self.init)()
        jax.block_until_ready(state)
      state = self._train(state)
      self.checkpoints.wait()
      return self._report(state)
    finally:
      self.progress.close()
      self.checkpoints.close()

  def _train(self, state: TrainState) -> TrainState:
    train, done = self.config.train, int(state.step)
    losses: list[jax.Array] = []
    self.progress.begin(done)
    start = self._clock()
    while done < self.steps and not self.best.stopped(train.patience):
      batch = self._next_batch()
      state, loss = self.step_fn(state, batch)
      done += 1
      losses.append(loss)
      # At whole multiples of the interval but for one shortly before the end, and at the end.
      near_end = self.steps - done < self.eval_interval / 2
      evaluating = done == self.steps or (done % self.eval_interval == 0 and not near_end)
      saving = bool(self.config.checkpoint.every) and done % self.config.checkpoint.every == 0
      if done % train.log_every == 0 or evaluating:
        self._log(state, done, losses)
        losses = []
      if evaluating or saving or self.termination.requested:
        # Before anything is kept: a checkpoint never holds a value that is not finite.
        self._check_finite(state)
        self.seconds += self._clock() - start
        if evaluating:
          state = self._evaluate(state, done)
        self._save(state, done)
        start = self._clock()
      if self.termination.requested:
        self.checkpoints.wait()
        raise Terminated(
          f"stopped by SIGTERM after step {done:,} of {self.steps:,}, which is saved; "
          "the same command goes on from there"
        )
    return state

  def _clock(self) -> float:
    """Seconds that stand still while a step is compiled."""
    return time.perf_counter() - self.step_fn.seconds

  def _next_batch(self):
    first = "first batch" not in self.phases.seconds
    start = time.perf_counter()
    batch = next(self.batches)
    if first:
      self.phases.add("first batch", time.perf_counter() - start)
    return batch

  def _log(self, state: TrainState, done: int, losses: list[jax.Array]) -> None:
    loss = float(np.mean(jax.device_get(losses)))  # Waits for the device.
    result = next(iter(self._train_metrics(state).values()))
    scalars = {"loss": loss, "ne": result["ne"], "auc": result["auc_binned"]}
    self.progress.log(done, scalars | {"learning_rate": self._learning_rate(done - 1)})
    if not math.isfinite(loss):
      self._check_finite(state)

  def _train_metrics(self, state: TrainState) -> dict[str, dict[str, float]]:
    return metrics.result(jax.device_get(state.sums), self.data.features.tasks)

  def _learning_rate(self, step: int) -> float:
    return self.config.optimizer.learning_rate * float(self.trainer.share(step))

  def _check_finite(self, state: TrainState) -> None:
    bad = {part: int(step) for part, step in jax.device_get(state.bad_step).items()}
    step = min(bad.values())
    if step != NEVER:
      raise self._not_finite(step, [part for part, first in bad.items() if first == step])
    if parts := not_finite(state):
      raise self._not_finite(int(state.step) - 1, parts)

  def _not_finite(self, step: int, parts: list[str]) -> NonFiniteError:
    self.checkpoints.wait()
    kept = self.checkpoints.steps
    return NonFiniteError(
      f"step {step + 1:,}: not finite: {', '.join(parts)}; the learning rates were "
      f"{self._learning_rate(step):.3g} (dense) and "
      f"{self.config.embedding.learning_rate * float(self.trainer.share(step)):.3g} (tables); "
      + (f"the checkpoint of step {kept[-1]:,} is intact; " if kept else "")
      + "lower them, or set config.optimizer.clip_norm"
    )

  def _evaluate(self, state: TrainState, done: int) -> TrainState:
    """Measures on valid, remembers the best, and begins a new window of training metrics."""
    first = next(iter(self._train_metrics(state).values()))
    self.train_loss = first["loss"]
    results = self._results(state, "valid")
    pace = done * self.config.data.batch_size / max(self.seconds, 1e-9)
    self.progress.evaluated(done, "valid", results, pace)
    value = next(iter(results.values()))[self.best.metric]
    self.best.update(done, value)
    if self.best.step in (done, None):
      self.valid = results
    if self.best.stopped(self.config.train.patience):
      was = "it was never defined"  # One class only.
      if self.best.value is not None:
        was = f"best {self.best.value:.5f} at step {self.best.step:,}"
      self.progress.say(
        f"early stop: {self.best.metric} did not improve in {self.best.since} evaluations; {was}"
      )
    return state._replace(sums=metrics.zeros(len(self.data.features.tasks)))

  def _results(self, state: TrainState, split: str) -> dict[str, dict[str, Any]]:
    batches = evaluation_batches(self.data, split, batch_size=self.config.data.eval_batch_size)
    try:
      return evaluate(self.predict, state, batches, self.data.features)
    except PredictionError as error:
      raise self._not_finite(int(state.step) - 1, [f"{split}: {error}"]) from error

  def _save(self, state: TrainState, done: int) -> None:
    notes = {
      "position": self.batches.get_state(),
      "best": self.best.to_json(),
      "valid": self.valid,
      "train_loss": self.train_loss,
      "seconds": self.seconds,
      # A checkpoint tells on its own what it was trained with.
      "config": self.config.to_json(),
      "features": self.data.features.to_json(),
    }
    self.checkpoints.save(done, state, notes, best=self.best.step)

  def _resume(self) -> TrainState:
    restored = self.checkpoints.restore(jax.eval_shape(self.init))
    notes = restored.notes
    self.batches.set_state(notes["position"])
    self.best = BestSoFar(**notes["best"])
    self.valid, self.train_loss, self.seconds = (
      notes[name] for name in ("valid", "train_loss", "seconds")
    )
    self.progress.say(f"resuming from the checkpoint of step {restored.step:,}")
    return restored.state

  def _report(self, state: TrainState) -> dict[str, Any]:
    """Tests the best checkpoint and writes the summary."""
    done = int(state.step)
    if self.best.step is not None and self.best.step != done:
      state = self.checkpoints.restore(state, self.best.step).state
    test = self._results(state, "test")
    self.phases.add("compile", self.step_fn.seconds + self.predict.seconds)
    batch = self.config.data.batch_size
    seconds = max(self.seconds, 1e-9)
    summary = {
      "name": self.config.name,
      "train": {
        "loss": self.train_loss,
        "steps": done,
        "best_step": self.best.step,
        "examples_per_second": done * batch / seconds,
        "seconds": self.seconds,
      },
      "valid": summary_lib.split_summary(self.valid),
      "test": summary_lib.split_summary(test),
      "start_up_seconds": {n: round(s, 3) for n, s in self.phases.seconds.items()},
      "params": parameter_counts(state),
      "gflop_per_example": self._flops(state) / batch / 1e9,
      "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
      "seed": self.config.train.seed,
    }
    write_json(self.folder.path / SUMMARY, summary)
    self.progress.close()
    print("\n" + summary_lib.render(summary), flush=True)
    return summary

  def _flops(self, state: TrainState) -> int:
    batches = train_batches(self.data, batch_size=self.config.data.batch_size, seed=0)
    abstract = jax.eval_shape(lambda: (state, next(iter(batches))))
    return matmul_flops(functools.partial(train_step, self.trainer), *abstract)
