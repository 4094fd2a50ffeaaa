"""A run of launch/next_item.py as the source of a conversion, and as its result."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from gemjax.checkpoint.streamed import StoredArrays, Streamed, write_streamed
from gemjax.config.next_item import NextItem
from gemjax.convert import generative_recommenders
from gemjax.convert.names import to_ours, to_theirs
from gemjax.convert.tensors import ConvertError, Tensor, Tensors, described, of_array
from gemjax.convert.training_state import named
from gemjax.data.next_item import read_events
from gemjax.fields import ConfigError
from gemjax.train.next_item import Trainer
from gemjax.train.workdir import CHECKPOINTS

PARAMS = "params."
FIRST_STEP = 0


class NextItemRun(NamedTuple):
  """Weights by their paths in a tower."""

  config: NextItem
  items: int
  tensors: Tensors


def read_next_item(path: pathlib.Path, step: int | None) -> NextItemRun:
  """The latest checkpoint of a run, or that of `step`.

  Raises:
    ConvertError, CheckpointError: it is no such run, or its checkpoint is corrupt.
  """
  stored = StoredArrays(path / CHECKPOINTS, step)
  try:
    config = NextItem.from_json(stored.notes["config"])
  except ConfigError as error:
    raise ConvertError(f"{path} is no run of launch/next_item.py ({error})") from error
  items = stored.shape(f"{PARAMS}item_VD")[0]

  def tensor(name: str, like: Any) -> Tensor:
    return Tensor(like.shape, like.dtype, lambda a, b: stored.read(name, a, b))

  weights = {
    name.removeprefix(PARAMS): tensor(name, like)
    for name, like in _leaves(config, items).items()
    if name.startswith(PARAMS)
  }
  return NextItemRun(config, items, weights)


def write_next_item(path: pathlib.Path, run: NextItemRun) -> None:
  """A folder that launch/next_item.py with the same config ranks and trains on, from step 0."""
  path.mkdir()
  trainer = Trainer(run.config, run.items, steps=1)

  def streamed(name: str, like: Any) -> Streamed:
    tensor = run.tensors.get(name.removeprefix(PARAMS)) if name.startswith(PARAMS) else None
    tensor = tensor or of_array(np.zeros(like.shape, like.dtype))
    return Streamed(like.shape, like.dtype, lambda rows: tensor.pieces(rows))

  leaves = [streamed(name, like) for name, like in _leaves(run.config, run.items).items()]
  state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(trainer.born)), leaves)
  notes = {"config": run.config.to_json(), "seconds": 0.0}
  write_streamed(path / CHECKPOINTS, FIRST_STEP, state, notes)


def read_public_hstu(theirs: Tensors, config: NextItem, what: str) -> NextItemRun:
  """A run with the tensors of a file of generative-recommenders.

  Raises:
    ConvertError: the file does not hold what the config describes, or not what its data name.
    RawDataError: the data cannot be read.
  """
  theirs = generative_recommenders.without_mask(theirs, config, what)
  ours = to_ours(generative_recommenders.entries(config), theirs, what)
  items = ours["item_VD"].rows
  if items != (found := read_events(pathlib.Path(config.path), own_ids=True).items):
    raise ConvertError(
      f"{what} has {items} rows for items, but those of config.path, {config.path}, ask for "
      f"{found}, one for every number up to the greatest; name the data that it was trained on"
    )
  for name, like in _leaves(config, items).items():
    tensor = ours.get(name.removeprefix(PARAMS)) if name.startswith(PARAMS) else None
    if tensor and tensor.shape != like.shape:
      raise ConvertError(
        f"{what}: {name.removeprefix(PARAMS)} is {described(tensor)}, but the config asks for the "
        f"shape {like.shape}"
      )
  return NextItemRun(config, items, ours)


def as_public_hstu(run: NextItemRun) -> Tensors:
  """The run's weights as a state_dict of generative-recommenders."""
  theirs = to_theirs(generative_recommenders.entries(run.config), run.tensors)
  return generative_recommenders.with_mask(theirs, run.config)


def _leaves(config: NextItem, items: int) -> dict[str, Any]:
  return named(jax.eval_shape(Trainer(config, items, steps=1).born))
