"""A run's folder as the source of a conversion, and as its result."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from gemjax import config as config_lib
from gemjax.checkpoint.streamed import StoredArrays, write_streamed
from gemjax.convert.safetensors_file import read_safetensors, write_safetensors
from gemjax.convert.tensors import ConvertError, Tensors, described
from gemjax.convert.training_state import parts, state_of, tensors_of
from gemjax.data.prepared import open_prepared
from gemjax.features import FeatureSet
from gemjax.train.state import Trainer, make_trainer
from gemjax.train.stopping import BestSoFar
from gemjax.train.workdir import CHECKPOINTS, RUN, read_run, write_json

FIRST_STEP = 0


class Run(NamedTuple):
  """A state's tensors and what says how to read them."""

  trainer: Trainer
  digests: dict[str, int]  # Of the splits of its data.
  tensors: Tensors
  kept: dict[str, int]  # Whole numbers of another library that have no place in a state.


def open_run(config: config_lib.Config) -> Run:
  """A run that has no tensors yet, of a config whose data are prepared."""
  data = open_prepared(config.data.path)
  digests = {name: split.digest for name, split in data.splits.items()}
  return Run(make_trainer(config, data.features, steps=1), digests, {}, {})


def read_workdir(path: pathlib.Path, step: int | None) -> Run:
  """The best checkpoint of a run, or the one of `step`."""
  tree = read_run(path)
  trainer = _trainer(tree, path / RUN)
  stored = StoredArrays(path / CHECKPOINTS, step)
  if step is None and stored.notes["best"]["step"] not in (None, stored.step):
    stored = StoredArrays(path / CHECKPOINTS, stored.notes["best"]["step"])
  return Run(
    trainer, tree["digests"], tensors_of(trainer, stored.read), stored.notes.get("kept", {})
  )


def write_workdir(path: pathlib.Path, run: Run) -> None:
  """A folder that training goes on in, from step 0, and evaluation reads."""
  path.mkdir()
  config, features = run.trainer.config, run.trainer.features
  notes = {
    "position": {"next_index": 0},
    "best": BestSoFar(metric=config.train.stop_metric).to_json(),
    "valid": {},
    "train_loss": 0.0,
    "seconds": 0.0,
    "config": config.to_json(),
    "features": features.to_json(),
    "kept": run.kept,
  }
  write_streamed(path / CHECKPOINTS, FIRST_STEP, state_of(run.trainer, run.tensors), notes)
  write_json(path / RUN, _described(run))


def read_file(path: pathlib.Path) -> Run:
  """A run that `write_file` wrote.

  Raises:
    ConvertError: a tensor of the run is missing, of another shape, or too many.
  """
  tensors, metadata = read_safetensors(path)
  try:
    tree = json.loads(metadata["gemjax"])
    tree = {name: tree[name] for name in ("config", "features", "digests", "kept")}
  except (KeyError, ValueError, TypeError) as error:
    raise ConvertError(
      f"{path} says nothing of a config: it was not written by this tool with --to=safetensors; "
      "name the library whose names it has by --from"
    ) from error
  trainer = _trainer(tree, path)
  check_tensors(trainer, tensors, str(path))
  return Run(trainer, tree["digests"], tensors, tree["kept"])


def write_file(path: pathlib.Path, run: Run) -> None:
  """All of a run's tensors under their names, with config and features as metadata."""
  write_safetensors(path, run.tensors, {"gemjax": json.dumps(_described(run) | {"kept": run.kept})})


def check_tensors(
  trainer: Trainer, tensors: Tensors, what: str, *, weights: bool = False, tables: bool = False
) -> None:
  """Raises ConvertError unless these are all tensors of a state, of its shapes.

  Args:
    trainer: Of the state.
    tensors: Under our names.
    what: File that they come from.
    weights: Those of optimisers may be missing.
    tables: Those that are not of tables as well.
  """
  wanted = {part.name: part for part in parts(trainer)}
  for name, part in wanted.items():
    if name in tensors:
      if tensors[name].shape != part.shape:
        raise ConvertError(
          f"{what}: {name} is {described(tensors[name])}, but the config asks for the shape "
          f"{part.shape}"
        )
    elif not weights or name.endswith(".rows") or (part.leaf[:7] == "params." and not tables):
      raise ConvertError(f"{what} lacks {name}, which the config asks for")
  if extra := [name for name in tensors if name not in wanted]:
    raise ConvertError(f"{what} has {extra[0]}, which the config does not ask for")


def _described(run: Run) -> dict[str, Any]:
  return {
    "config": run.trainer.config.to_json(),
    "features": run.trainer.features.to_json(),
    "digests": run.digests,
  }


def _trainer(tree: dict[str, Any], file: pathlib.Path) -> Trainer:
  try:
    config = config_lib.Config.from_json(tree["config"])
    return make_trainer(config, FeatureSet.from_json(tree["features"]), steps=1)
  except (ValueError, KeyError) as error:
    raise ConvertError(f"{file}: {error}") from error
