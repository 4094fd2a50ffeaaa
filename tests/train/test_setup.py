"""What a run is made of: its batches and its evaluation are dealt by what its examples cost."""

import numpy as np
import pytest

from gemjax import config as c
from gemjax.data.prepared import PreparedWriter
from gemjax.features import EventColumn, FeatureSet, History, Sparse
from gemjax.train.progress import Phases
from gemjax.train.setup import evaluation, set_up
from gemjax.train.workdir import Workdir

N, BATCH, SHARDS = 2048, 256, 8


@pytest.fixture
def run(tmp_path):
  """Of examples in order of how much they have seen, each a user, some a hundred times as much."""
  rng = np.random.default_rng(0)
  with PreparedWriter(tmp_path / "data", block_size=256) as writer:
    lengths = {
      split: np.sort(rng.zipf(1.5, N).clip(1, 300)) for split in ("train", "valid", "test")
    }
    offsets = np.append(0, np.cumsum(np.concatenate([*lengths.values()])))
    history = History(
      name="past", columns=(EventColumn(name="item", size=9, table="item"),), max_length=300
    )
    ids = rng.integers(2, 9, offsets[-1]).astype(np.int32)
    writer.add_history(history, {"item": ids}, np.zeros(offsets[-1], np.int64), offsets)
    for i, split in enumerate(lengths):
      rows = np.arange(i * N, (i + 1) * N)
      columns = {
        "ids": rng.integers(2, 9, (N, 1)).astype(np.int32),
        "label": rng.integers(0, 2, (N, 1)).astype(np.uint8),
        "time": np.ones(N, np.int64),
        "past.start": offsets[rows],
        "past.stop": offsets[rows + 1],
      }
      writer.add(split, columns)
    sparse = (Sparse(name="item", size=9, table="item"),)
    writer.finish(FeatureSet(sparse=sparse, history=(history,)), origin={})
  config = c.Config(
    name="dealt",
    data=c.Data(path=str(tmp_path / "data"), batch_size=BATCH, eval_batch_size=1000),
    embedding=c.Embedding(dim=8),
    model=c.Din(hidden=(8,), head=(8,)),
    mesh=c.Mesh(data=1, model=SHARDS),
  )
  config.validate()
  with Workdir(tmp_path / "run", first=True) as folder:
    yield set_up(config, folder, Phases())


def used(batches):
  """Share of the slots for events that have one."""
  past = [b.histories["past"] for b in batches]
  return sum(int(p.lengths_B.sum()) for p in past) / sum(len(p.age_E) for p in past)


def test_training_is_dealt(run):
  batches = [run.feed.advance()[0] for _ in range(N // BATCH)]
  assert used(batches) > 0.8  # In any order of the examples: below 0.5.


def test_evaluation_fills_up_batches_that_the_devices_cannot_share(run):
  run.config.data.eval_batch_size = 1000 - SHARDS + 1
  sizes = {len(b.weight_B) for b in evaluation(run.config, run.data, run.mesh, "valid")}
  assert sizes == {1000}


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_is_dealt(run, split):
  batches = list(evaluation(run.config, run.data, run.mesh, split))
  assert len(batches) == 3 and sum(b.weight_B.sum() for b in batches) == N
  assert used(batches) > 0.8  # In file order: a fifth.
