"""A trained run, read back from its workdir; nothing there is changed, so that it may go on."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax

from gemjax import config as config_lib
from gemjax.checkpoint import Checkpoints
from gemjax.data.pipeline import evaluation_batches
from gemjax.data.prepared import PreparedData, open_prepared
from gemjax.train.compiled import Compiled
from gemjax.train.evaluate import evaluate
from gemjax.train.source import open_data
from gemjax.train.state import TrainState, init_state, make_trainer
from gemjax.train.step import predict_step
from gemjax.train.workdir import CHECKPOINTS, RUN, WorkdirError, check_features, read_run


class Evaluated(NamedTuple):
  """What was measured."""

  name: str  # Of the config.
  step: int
  data: PreparedData
  results: dict[str, dict[str, Any]]  # Task -> metrics.


def evaluate_run(
  workdir: pathlib.Path, split: str, *, step: int | None = None, data: str | None = None
) -> Evaluated:
  """Measures a checkpoint exactly: the best one unless `step` names another.

  Args:
    workdir: Folder of the run.
    split: Of the data.
    step: Step of the checkpoint.
    data: Prepared folder instead of the run's own.

  Raises:
    WorkdirError: there is no run, or its features are not those of the data.
    PreparedDataError: there is no such data or split.
    CheckpointError: there is no such checkpoint, or it cannot be read.
  """
  run = read_run(workdir)
  try:
    config = config_lib.Config.from_json(run["config"])
  except config_lib.ConfigError as error:
    raise WorkdirError(f"{workdir / RUN}: {error}") from error
  found = open_prepared(data) if data else open_data(config, workdir, make=False)
  check_features(workdir, run["features"], found.features)
  found.split(split)
  checkpoints = Checkpoints(workdir / CHECKPOINTS, read_only=True)
  if step is None:
    step = checkpoints.notes()["best"]["step"]  # None, thus the latest, before any evaluation.
  trainer = make_trainer(config, found.features, steps=1)  # Its schedules are not used.
  like = jax.eval_shape(functools.partial(init_state, trainer, config.train.seed))
  state: TrainState = checkpoints.restore(like, step).state
  checkpoints.close()
  batches = evaluation_batches(found, split, batch_size=config.data.eval_batch_size)
  predict = Compiled(functools.partial(predict_step, trainer))
  results = evaluate(predict, state, batches, found.features)
  return Evaluated(config.name, int(state.step), found, results)
