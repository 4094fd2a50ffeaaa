"""What the tests of conversion do with runs."""

import dataclasses

import numpy as np
import small

from gemjax import convert as convert_lib
from gemjax.checkpoint import Checkpoints
from gemjax.config import Config
from gemjax.data.pipeline import evaluation_batches
from gemjax.data.prepared import open_prepared
from gemjax.parallel.mesh import make_mesh
from gemjax.train.devices import part_of_process
from gemjax.train.programs import Programs
from gemjax.train.state import make_trainer
from gemjax.train.workdir import CHECKPOINTS, read_run


def config_of(peer, data, embedding=None, **model) -> Config:
  config = small.get_config(peer)
  config.data.path = str(data)
  config.model = dataclasses.replace(config.model, **model)
  config.embedding = dataclasses.replace(config.embedding, **(embedding or {}))
  return config


def convert(source, target, input, output, **options) -> list[str]:
  return convert_lib.convert(source=source, target=target, input=input, output=output, **options)


def restored(run, step=None):
  """(trainer, state, data) of a run, as evaluation restores it."""
  config = Config.from_json(read_run(run)["config"])
  data = open_prepared(config.data.path)
  trainer = make_trainer(config, data.features, steps=1)
  checkpoints = Checkpoints(run / CHECKPOINTS, read_only=True)
  state = checkpoints.restore(trainer.abstract(), step).state
  checkpoints.close()
  return trainer, state, data


def logits(run, split) -> np.ndarray:
  """(N, T) of a split, in its order."""
  trainer, state, data = restored(run)
  mesh = make_mesh(1, 1, trainer.mesh.devices.reshape(-1))
  batches = evaluation_batches(
    data, split, batch_size=128, history_length=0, **part_of_process(mesh)
  )
  predict = Programs(trainer).predict
  parts = [np.asarray(predict(state, batch))[batch.weight_B > 0] for batch in batches]
  return np.concatenate(parts)
