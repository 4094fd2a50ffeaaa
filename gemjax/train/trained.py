"""A trained run, read back from its workdir; nothing there is changed, so that it may go on."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax

from gemjax import config as config_lib
from gemjax.checkpoint import Checkpoints
from gemjax.data.prepared import PreparedData, open_prepared
from gemjax.train.devices import open_mesh
from gemjax.train.evaluate import evaluate
from gemjax.train.programs import Programs
from gemjax.train.setup import evaluation
from gemjax.train.source import open_data
from gemjax.train.state import TrainState, make_trainer
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
  # Trained on a larger machine.
  if max(1, config.mesh.data) * max(1, config.mesh.model) > jax.device_count():
    config.mesh = config_lib.Mesh()
  mesh, _ = open_mesh(config, found.features)
  trainer = make_trainer(config, found.features, steps=1, mesh=mesh)  # Its schedules are not used.
  state: TrainState = checkpoints.restore(trainer.abstract(), step).state
  checkpoints.close()
  batches = evaluation(config, found, mesh, split)
  results = evaluate(Programs(trainer).predict, state, batches, found.features)
  return Evaluated(config.name, int(state.step), found, results)
