"""The training loop: resume, train, evaluate, save, stop, report."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gemjax import config as config_lib
from gemjax import metrics
from gemjax.data.blocks import CorruptBlockError
from gemjax.train import summary as summary_lib
from gemjax.train.evaluate import PredictionError, evaluate
from gemjax.train.finite import NonFiniteError, first_not_finite, learning_rate
from gemjax.train.progress import Phases, Progress
from gemjax.train.recovery import Recovery
from gemjax.train.setup import Setup, evaluation, set_up
from gemjax.train.state import TrainState, parameter_counts
from gemjax.train.step import Ahead, Report
from gemjax.train.stopping import BestSoFar
from gemjax.train.termination import Terminated, Termination
from gemjax.train.workdir import Workdir, saved_steps

_KEPT = ("valid", "train_loss", "seconds")


def train(
  config: config_lib.Config, workdir: pathlib.Path, phases: Phases | None = None
) -> dict[str, Any]:
  """Trains to the end and returns the summary; the same call resumes what was interrupted.

  `phases` has what came before, as seconds of imports, and knows the other processes of the run.

  Raises:
    ConfigError, PreparedDataError, CorruptBlockError, WorkdirError: before any work.
    CheckpointError: a checkpoint cannot be read or written.
    NonFiniteError: with step, learning rate and part; the last checkpoint is from before.
    Terminated: SIGTERM came; a checkpoint of the last step is saved.
  """
  config.validate()
  phases = phases or Phases()
  with Termination() as termination, Workdir(workdir, first=not jax.process_index()) as folder:
    run = set_up(config, folder, phases)
    with run.cache.behind_jax():
      return _Run(run, folder, phases, termination).run()


class _Run:
  """One run's parts; `run` is the order in which they act."""

  def __init__(self, setup: Setup, folder: Workdir, phases: Phases, termination: Termination):
    self.config, self.setup, self.folder, self.phases = setup.config, setup, folder, phases
    self.termination, self.peers = termination, phases.peers
    self.data, self.mesh, self.trainer = setup.data, setup.mesh, setup.trainer
    self.programs, self.feed = setup.programs, setup.feed
    self.steps, self.apart, config = setup.steps, setup.apart, setup.config
    self.progress = Progress(folder.path, self.steps, config.data.batch_size, shown=folder.first)
    for line in setup.lines:
      self.progress.say(line)
    self.best = BestSoFar(metric=config.train.stop_metric)
    self.valid: dict[str, Any] = {}  # Results of the best evaluation.
    self.pending = False  # Whether the evaluation of the restored step is still to be made.
    self.train_loss = math.nan  # Mean since the evaluation before.
    self.seconds = 0.0  # In steps, over all starts, without compilation.
    self.recovery = Recovery(config.checkpoint, folder, self.progress.say)

  def run(self) -> dict[str, Any]:
    """Resume or begin, train, choose the best, test, report."""
    self.termination.deferred = True
    with contextlib.closing(self.progress), self.recovery:
      state = self._train(self._begin())
      self.recovery.end()
      return self._report(state)

  def _begin(self) -> TrainState:
    """The last sound state, or the first, while a thread reads batches and has programs ready."""
    beginning, notes = self.feed.get_state(), self.recovery.likely_notes() or {}
    likely = notes.get("position", beginning)
    if notes:
      self.feed.set_state(likely)
    self.peers.phase("first batch")
    # By a program of all processes: not beside Orbax, which runs some of its own.
    self.programs.measure(lambda: self.feed.upcoming, notes.get("exchange"))
    with ThreadPoolExecutor(1, "compile") as beside:
      ready = beside.submit(self._prepare)
      with self.phases("state"):
        restored = self.recovery.restore(self.trainer.abstract)
        state = restored.state if restored else self.programs.born()
        jax.block_until_ready(state)
      with self.phases("wait for programs"):
        ready.result()
    if (position := restored.notes["position"] if restored else beginning) != likely:
      self.feed.set_state(position)
    if restored:
      self._recall(restored.notes)
    return state

  def _prepare(self) -> None:
    start = time.perf_counter()
    first = self.feed.upcoming
    if (saved_steps(self.folder.path) or [0])[-1] < self.steps:
      second = self.feed.ahead(1)
      self.phases.add("first batch", time.perf_counter() - start)
      self.programs.prepare(first, second)

  def _train(self, state: TrainState) -> TrainState:
    train, done = self.config.train, int(state.step)
    reports: list[Report] = []
    self.progress.begin(done)
    if self.pending:
      state = self._evaluate(state, done)
    ahead = self.programs.ahead(state, self.feed.upcoming)
    self.started = self._clock()
    while done < self.steps and not self.best.stopped(train.patience):
      self.peers.phase(f"batch behind step {done + 1:,}")
      batch, upcoming = self._read(self.feed.advance, state, done, ahead)
      self.peers.phase(f"step {done + 1:,}")
      state, ahead, report = self.programs.step(state, ahead, batch, upcoming)
      done += 1
      reports.append(report)
      if "first step" not in self.phases.seconds:
        jax.block_until_ready(report)
        self.phases.add("compile", self.programs.compile_seconds)
        self.progress.say(self.phases.at_first_step())
      # Where groups update tables of their own, the state is one at multiples of `apart` only.
      whole = done % self.apart == 0 or done == self.steps
      evaluating = self.setup.evaluates(done)
      saving = whole and self._due(self.config.checkpoint.every, done)
      stopping = whole and self.termination.agreed(now=self._due(train.log_every, done))
      lasting = evaluating or saving or stopping
      between = whole and self._due(self.config.checkpoint.local_every, done)
      averaging = whole and self.trainer.tables.averaged
      pausing = lasting or between or averaging
      if pausing:
        state = self.programs.settle(state, ahead)
      if averaging:
        state = self.programs.average(state)
      if done % train.log_every == 0 or evaluating:
        self._log(state, done, reports)
        reports = []
      if lasting or between:
        # Before anything is kept: a checkpoint never holds a value that is not finite.
        self._check_finite(state)
        self.seconds += self._clock() - self.started
        if evaluating:
          state = self._evaluate(state, done)
        self._save(state, done, lasting=lasting)
        self.started = self._clock()
      if pausing and ahead.rows is not None:  # As a run that resumes from here will read them.
        ahead = self.programs.ahead(state, upcoming)
      if stopping:
        self.peers.agree_to_end()
        self.recovery.end()
        at = f"after step {done:,} of {self.steps:,}, which is saved"
        raise Terminated(f"stopped by SIGTERM {at}; the same command goes on from there")
    return state

  def _read(self, read: Callable, state: TrainState, done: int, ahead: Ahead | None = None) -> Any:
    """The next batch, where `ahead` is given, or results; if their data is corrupt, this is raised
    when the steps so far are saved, which one process of several cannot do.
    """
    try:
      return read()
    except CorruptBlockError as error:
      lost = error  # Orbax takes an error that is being handled for its own.
    self.recovery.checkpoints.wait()
    new = done not in (0, *self.recovery.checkpoints.steps)
    if new and not (ahead and done % self.apart) and jax.process_count() == 1:
      if ahead:
        self.seconds += self._clock() - self.started
        self._check_finite(state := self.programs.settle(state, ahead))
      self._save(state, done, lasting=True, pending=not ahead)
      self.recovery.end()
      self.progress.say(f"step {done:,} is saved: the same command goes on there with whole files")
    raise lost

  def _clock(self) -> float:
    """Seconds that stand still while a program is compiled."""
    return time.perf_counter() - self.programs.compile_seconds

  def _due(self, every: int, done: int) -> bool:
    """Whether a multiple of `every` was reached since the last step at which the state was one."""
    return bool(every) and done // every > (done - self.apart) // every

  def _log(self, state: TrainState, done: int, reports: list[Report]) -> None:
    self.peers.phase(f"results of step {done:,}")
    reports = jax.device_get(reports)  # Waits for the device.
    loss = float(np.mean([report.loss for report in reports]))
    result = next(iter(self._train_metrics(state).values()))
    scalars = {"loss": loss, "ne": result["ne"], "auc": result["auc_binned"]}
    if getattr(self.config.model, "next_event", 0):
      scalars["next_event"] = float(np.mean([report.next_event for report in reports]))
    if rounds := max(int(report.exchange_rounds) for report in reports):
      scalars["exchange_rounds"] = rounds
    if self.data.features.history:
      scalars |= {"padding": self.feed.padding(), "programs": self.programs.compilations}
    self.progress.log(done, scalars | {"learning_rate": learning_rate(self.trainer, done - 1)})
    if not math.isfinite(loss):
      self._check_finite(state)

  def _train_metrics(self, state: TrainState) -> dict[str, dict[str, float]]:
    return metrics.result(jax.device_get(state.sums), self.data.features.tasks)

  def _check_finite(self, state: TrainState) -> None:
    if (found := first_not_finite(state)) is not None:
      raise self._not_finite(*found)

  def _not_finite(self, step: int, parts: list[str]) -> NonFiniteError:
    self.recovery.checkpoints.wait()
    return NonFiniteError(self.trainer, step, parts, self.recovery.checkpoints.steps)

  def _evaluate(self, state: TrainState, done: int) -> TrainState:
    """Measures on valid, remembers the best, and begins a new window of training metrics."""
    self.train_loss = next(iter(self._train_metrics(state).values()))["loss"]
    results = self._read(functools.partial(self._results, state, "valid"), state, done)
    pace = done * self.config.data.batch_size / max(self.seconds, 1e-9)
    self.progress.evaluated(done, "valid", results, pace)
    self.best.update(done, next(iter(results.values()))[self.best.metric])
    if self.best.step in (done, None):
      self.valid = results
    if self.best.stopped(self.config.train.patience):
      self.progress.say(f"early stop: {self.best.verdict()}")
    return state._replace(sums=self.programs.no_sums())

  def _results(self, state: TrainState, split: str) -> dict[str, dict[str, Any]]:
    batches = evaluation(self.config, self.data, self.mesh, split)
    try:
      batches = self.peers.phases(f"evaluation on {split}", batches)
      return evaluate(self.programs.predict, state, batches, self.data.features)
    except PredictionError as error:
      raise self._not_finite(int(state.step) - 1, [f"{split}: {error}"]) from error

  def _save(self, state: TrainState, done: int, *, lasting: bool, pending: bool = False) -> None:
    self.peers.phase(f"save of step {done:,}")
    notes = {
      "position": self.feed.get_state(),
      "best": self.best.to_json(),
      **{name: getattr(self, name) for name in _KEPT},
      "pending": pending,
      "exchange": self.programs.exchange,
      # A checkpoint tells on its own what it was trained with.
      "config": self.config.to_json(),
      "features": self.data.features.to_json(),
    }
    save = self.recovery.save if lasting else self.recovery.snapshot
    save(done, state, notes, best=self.best.step)

  def _recall(self, notes: dict[str, Any]) -> None:
    """Goes on where the run was when it saved these."""
    self.best = BestSoFar(**notes["best"])
    vars(self).update({name: notes[name] for name in _KEPT})
    self.pending = notes.get("pending", False)

  def _best(self, last: TrainState) -> TrainState:
    """That of the best checkpoint; the last one where it cannot be read, and says so."""
    from gemjax.checkpoint import CheckpointError

    try:
      return self.recovery.checkpoints.restore(self.trainer.abstract(), self.best.step).state
    except CheckpointError as error:
      self.progress.say(f"the best checkpoint cannot be tested, the last one is: {error}")
      self.best.step, self.valid = int(last.step), self._results(last, "valid")
      return last

  def _report(self, state: TrainState) -> dict[str, Any]:
    """Tests the best checkpoint and writes the summary."""
    done = int(state.step)
    if self.best.step not in (None, done):
      state = self._best(state)
    test, batch = self._results(state, "test"), self.config.data.batch_size
    summary = {
      "name": self.config.name,
      "train": {
        "loss": self.train_loss if math.isfinite(self.train_loss) else None,
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
      summary_lib.publish(summary, self.folder.path)
    return summary
