"""What a run is made of before its first step, for the training and for compiling ahead of it."""

from __future__ import annotations

import functools
import math
import pathlib
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from gemjax import config as config_lib
from gemjax.data.batches import Cost
from gemjax.data.block_reader import BlockReader
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import PreparedData
from gemjax.parallel.arrays import first_process_first
from gemjax.train.cache import Cache
from gemjax.train.cost import example_cost
from gemjax.train.devices import open_training, part_of_process
from gemjax.train.executables import Executables, origin_of
from gemjax.train.feed import Feed
from gemjax.train.programs import Programs
from gemjax.train.progress import Phases, say
from gemjax.train.source import open_data
from gemjax.train.state import Trainer, make_trainer
from gemjax.train.workdir import Workdir


class Setup(NamedTuple):
  """The parts of a run."""

  config: config_lib.Config  # Within its activation budget.
  data: PreparedData
  steps: int
  mesh: Mesh
  lines: list[str]  # Why the mesh is as it is.
  trainer: Trainer
  programs: Programs
  feed: Feed
  cache: Cache

  @property
  def apart(self) -> int:
    """Steps after which the state is one again, where groups update tables of their own."""
    return self.config.embedding.average_every if self.trainer.tables.averaged else 1

  def evaluates(self, step: int) -> bool:
    """At the end, and at multiples of the interval, which are multiples of `apart`, but for one
    shortly before the end.
    """
    train, batch = self.config.train, self.config.data.batch_size
    if step == self.steps or not train.eval_every:
      return step == self.steps
    interval = max(1, round(train.eval_every * self.data.split("train").examples / batch))
    interval = -(-interval // self.apart) * self.apart
    return not step % interval and self.steps - step >= interval / 2


def set_up(config: config_lib.Config, folder: Workdir, phases: Phases) -> Setup:
  """The parts of the run of `folder`, which is its own from here on.

  Raises:
    ConfigError, PreparedDataError, CorruptBlockError, WorkdirError: before the folder is touched.
  """
  with phases("data", endless=True):  # A raw set of terabytes may have to be prepared.
    data = first_process_first("data", open_data, config, folder.path)
    for split in ("train", "valid", "test"):
      BlockReader(data, split).check_files()
  with phases("trainer"):
    batch = config.data.batch_size
    epochs = config.train.epochs * data.split("train").examples / batch
    steps = config.train.steps or math.ceil(epochs)
    mesh, config, lines = open_training(config, data.features)
    trainer = make_trainer(config, data.features, steps, mesh)
    cache = Cache.of_run(folder.path, config.compilation.cache, writes=folder.first)
    says = say if folder.first else lambda sentence: None
    executables = Executables(
      cache, origin_of(config, data.features, steps, mesh), list(mesh.devices.flat), says
    )
    batches = train_batches(
      data,
      batch_size=batch,
      seed=config.train.seed,
      window_blocks=config.data.window_blocks,
      history_length=config.data.history,
      cost=_cost(config, data),
      **part_of_process(mesh),
    )
    # What can be refused has been refused: from here on the folder is this run's.
    digests = {name: split.digest for name, split in data.splits.items()}
    folder.claim(config, data.features, digests)
  return Setup(
    config=config,
    data=data,
    steps=steps,
    mesh=mesh,
    lines=lines,
    trainer=trainer,
    programs=Programs(trainer, executables, folder.path),
    feed=Feed(iter(batches), mesh),
    cache=cache,
  )


def compile_ahead(
  config: config_lib.Config, workdir: pathlib.Path, phases: Phases | None = None
) -> tuple[pathlib.Path, float]:
  """Compiles what `train` will need until its first evaluation; returns the folder that has it, and
  the seconds it took.

  Nothing is trained. Batches of other shapes than the first need further programs.

  Raises:
    ConfigError, PreparedDataError, CorruptBlockError, WorkdirError: before any work.
    OSError: The folder takes no programs.
  """
  config.validate()
  if config.compilation.cache == "off":
    raise config_lib.ConfigError("config.compilation.cache is 'off': nothing would be kept")
  phases = phases or Phases()
  with Workdir(workdir, first=not jax.process_index()) as folder:
    run = set_up(config, folder, phases)
    run.cache.needed = True
    start = time.perf_counter()
    with run.cache.behind_jax():
      phases.peers.phase("first batch")
      batch, upcoming = run.feed.ahead(0), run.feed.ahead(1)
      phases.peers.phase("compile the step")
      run.programs.prepare(batch, upcoming)
      phases.peers.phase("compile evaluation")
      run.programs.prepare_to_predict(next(iter(evaluation(config, run.data, run.mesh, "valid"))))
    folder = run.cache.folder or pathlib.Path(jax.config.jax_compilation_cache_dir)
    return folder, time.perf_counter() - start


def evaluation(config: config_lib.Config, data: PreparedData, mesh: Mesh, split: str):
  """This process' batches of a split, each example once, on any number of devices."""
  per_device = -(-config.data.eval_batch_size // mesh.size)  # Rows that fill up have weight 0.
  return evaluation_batches(
    data,
    split,
    batch_size=per_device * mesh.size,
    window_blocks=config.data.window_blocks if data.features.history else 1,  # Nothing is dealt.
    history_length=config.data.history,
    cost=_cost(config, data),
    **part_of_process(mesh),
  )


def _cost(config: config_lib.Config, data: PreparedData) -> Cost | None:
  """Of an example's events, if it has any."""
  return functools.partial(example_cost, config) if data.features.history else None
