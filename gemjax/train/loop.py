"""The training loop: resume, train, evaluate, save, stop, report."""

from __future__ import annotations

import contextlib
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
from gemjax.parallel.arrays import first_process_first, of_all_processes
from gemjax.train import summary as summary_lib
from gemjax.train.cost import example_cost
from gemjax.train.devices import open_mesh, part_of_process
from gemjax.train.evaluate import PredictionError, evaluate
from gemjax.train.feed import Feed
from gemjax.train.programs import Programs
from gemjax.train.progress import Phases, Progress
from gemjax.train.source import open_data
from gemjax.train.state import NEVER, TrainState, make_trainer, not_finite, parameter_counts
from gemjax.train.step import Report
from gemjax.train.stopping import BestSoFar
from gemjax.train.termination import Terminated, Termination
from gemjax.train.workdir import CHECKPOINTS, SUMMARY, Workdir, write_json


class NonFiniteError(RuntimeError):
  """Training met a value that is not finite."""


def train(
  config: config_lib.Config, workdir: pathlib.Path, phases: Phases | None = None
) -> dict[str, Any]:
  """Trains to the end and returns the summary; the same call resumes what was interrupted.

  `phases` has what came before, as seconds of imports, and knows the other processes of the run.

  Raises:
    ConfigError, PreparedDataError, WorkdirError: before any work.
    CheckpointError: a checkpoint cannot be read or written.
    NonFiniteError: with step, learning rate and part; the last checkpoint is from before.
    Terminated: SIGTERM came; a checkpoint of the last step is saved.
  """
  config.validate()
  phases = phases or Phases()
  with Termination() as termination, Workdir(workdir, first=not jax.process_index()) as folder:
    with phases("data", endless=True):  # A raw set of terabytes may have to be prepared.
      data = first_process_first("data", open_data, config, folder.path)
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
    self.mesh, lines = open_mesh(config, data.features)
    self.config, self.data, self.folder, self.phases = config, data, folder, phases
    self.termination, self.peers = termination, phases.peers
    self.trainer = make_trainer(config, data.features, self.steps, self.mesh)
    # Where groups update tables of their own, steps at which nothing else may look at them.
    self.apart = config.embedding.average_every if self.trainer.tables.averaged else 1
    self.eval_interval = -(-self.eval_interval // self.apart) * self.apart
    self.programs = Programs(self.trainer)
    batches = train_batches(
      data,
      batch_size=batch,
      seed=config.train.seed,
      window_blocks=config.data.window_blocks,
      history_length=config.data.history,
      cost=functools.partial(example_cost, config) if data.features.history else None,
      **part_of_process(self.mesh),
    )
    self.feed = Feed(iter(batches), self.mesh)
    # What can be refused has been refused: from here on the folder is this run's.
    self.checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=config.checkpoint.keep)
    digests = {name: split.digest for name, split in data.splits.items()}
    folder.claim(config, data.features, digests, begun=bool(self.checkpoints.steps))
    self.progress = Progress(folder.path, self.steps, batch, shown=folder.first)
    for line in lines:
      self.progress.say(line)
    self.best = BestSoFar(metric=config.train.stop_metric)
    self.valid: dict[str, Any] = {}  # Results of the best evaluation.
    self.train_loss = math.nan  # Mean since the evaluation before.
    self.seconds = 0.0  # In steps, over all starts, without compilation.

  def run(self) -> dict[str, Any]:
    """Resume or begin, train, choose the best, test, report."""
    self.termination.deferred = True
    with self.checkpoints, contextlib.closing(self.progress):
      with self.phases("state"):
        state = self._resume() if self.checkpoints.steps else self.trainer.born()
        jax.block_until_ready(state)
      state = self._train(state)
      self.checkpoints.wait()
      return self._report(state)

  def _train(self, state: TrainState) -> TrainState:
    train, done = self.config.train, int(state.step)
    reports: list[Report] = []
    self.progress.begin(done)
    with self.phases("first batch"):
      first = self.feed.upcoming
    plans = self.programs.plan(first)
    start = self._clock()
    while done < self.steps and not self.best.stopped(train.patience):
      self.peers.phase(f"batch behind step {done + 1:,}")
      batch, upcoming = self.feed.advance(), self.feed.upcoming
      self.peers.phase(f"step {done + 1:,}")
      state, plans, report = self.programs.step(state, plans, batch, upcoming)
      done += 1
      reports.append(report)
      # Groups that update tables of their own meet at whole multiples of `apart`, and at the end;
      # only there the state is one.
      whole = done % self.apart == 0 or done == self.steps
      if whole and self.apart > 1:
        state = self.programs.average(state)
      # At whole multiples of the interval but for one shortly before the end, and at the end.
      near_end = self.steps - done < self.eval_interval / 2
      evaluating = done == self.steps or (done % self.eval_interval == 0 and not near_end)
      saving = whole and self._due(self.config.checkpoint.every, done)
      stopping = whole and self._stop_requested(done)
      if done % train.log_every == 0 or evaluating:
        self._log(state, done, reports)
        reports = []
      if evaluating or saving or stopping:
        # Before anything is kept: a checkpoint never holds a value that is not finite.
        self._check_finite(state)
        self.seconds += self._clock() - start
        if evaluating:
          state = self._evaluate(state, done)
        self._save(state, done)
        start = self._clock()
      if stopping:
        self.peers.agree_to_end()
        self.checkpoints.wait()
        at = f"after step {done:,} of {self.steps:,}, which is saved"
        raise Terminated(f"stopped by SIGTERM {at}; the same command goes on from there")
    return state

  def _clock(self) -> float:
    """Seconds that stand still while a program is compiled."""
    return time.perf_counter() - self.programs.compile_seconds

  def _due(self, every: int, done: int) -> bool:
    """Whether a multiple of `every` was reached since the last step at which the state was one."""
    return bool(every) and done // every > (done - self.apart) // every

  def _stop_requested(self, done: int) -> bool:
    """Whether SIGTERM came to any process; several agree on it as often as they log."""
    if jax.process_count() == 1:
      return self.termination.requested
    agree = self._due(self.config.train.log_every, done)
    return agree and bool(of_all_processes(np.array([self.termination.requested])).any())

  def _log(self, state: TrainState, done: int, reports: list[Report]) -> None:
    self.peers.phase(f"results of step {done:,}")
    reports = jax.device_get(reports)  # Waits for the device.
    loss = float(np.mean([report.loss for report in reports]))
    result = next(iter(self._train_metrics(state).values()))
    scalars = {"loss": loss, "ne": result["ne"], "auc": result["auc_binned"]}
    if rounds := max(int(report.exchange_rounds) for report in reports):
      scalars["exchange_rounds"] = rounds
    if self.data.features.history:
      scalars |= {"padding": self.feed.padding(), "programs": self.feed.programs}
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
    self.train_loss = next(iter(self._train_metrics(state).values()))["loss"]
    results = self._results(state, "valid")
    pace = done * self.config.data.batch_size / max(self.seconds, 1e-9)
    self.progress.evaluated(done, "valid", results, pace)
    self.best.update(done, next(iter(results.values()))[self.best.metric])
    if self.best.step in (done, None):
      self.valid = results
    if self.best.stopped(self.config.train.patience):
      self.progress.say(f"early stop: {self.best.verdict()}")
    return state._replace(sums=self.programs.no_sums())

  def _results(self, state: TrainState, split: str) -> dict[str, dict[str, Any]]:
    batches = evaluation_batches(
      self.data,
      split,
      batch_size=self.config.data.eval_batch_size,
      history_length=self.config.data.history,
      **part_of_process(self.mesh),
    )
    try:
      batches = self.peers.phases(f"evaluation on {split}", batches)
      return evaluate(self.programs.predict, state, batches, self.data.features)
    except PredictionError as error:
      raise self._not_finite(int(state.step) - 1, [f"{split}: {error}"]) from error

  def _save(self, state: TrainState, done: int) -> None:
    self.peers.phase(f"save of step {done:,}")
    notes = {
      "position": self.feed.get_state(),
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
    restored = self.checkpoints.restore(self.trainer.abstract())
    notes = restored.notes
    self.feed.set_state(notes["position"])
    self.best = BestSoFar(**notes["best"])
    kept = (notes[name] for name in ("valid", "train_loss", "seconds"))
    self.valid, self.train_loss, self.seconds = kept
    for line in (*restored.passed, f"resuming from the checkpoint of step {restored.step:,}"):
      self.progress.say(line)
    return restored.state

  def _report(self, state: TrainState) -> dict[str, Any]:
    """Tests the best checkpoint and writes the summary."""
    done = int(state.step)
    if self.best.step is not None and self.best.step != done:
      state = self.checkpoints.restore(self.trainer.abstract(), self.best.step).state
    test = self._results(state, "test")
    self.phases.add("compile", self.programs.compile_seconds)
    batch = self.config.data.batch_size
    summary = {
      "name": self.config.name,
      "train": {
        "loss": self.train_loss,
        "steps": done,
        "best_step": self.best.step,
        "examples_per_second": done * batch / max(self.seconds, 1e-9),
        "seconds": self.seconds,
      },
      "valid": summary_lib.split_summary(self.valid),
      "test": summary_lib.split_summary(test),
      "start_up_seconds": {n: round(s, 3) for n, s in self.phases.seconds.items()},
      "params": parameter_counts(self.trainer, state),
      "gflop_per_example": self.programs.flops(state, self.feed.upcoming) / batch / 1e9,
      "device": f"{jax.devices()[0].device_kind} x{self.mesh.size}",
      "mesh": dict(self.mesh.shape),
      "seed": self.config.train.seed,
    }
    self.progress.close()
    if self.folder.first:
      write_json(self.folder.path / SUMMARY, summary)
      print("\n" + summary_lib.render(summary), flush=True)
    return summary
