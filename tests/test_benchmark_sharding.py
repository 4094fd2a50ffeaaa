"""The benchmark of sharded tables counts what a hand, NumPy and the compiled program count."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from gemjax.config import Config, Embedding, Fm
from gemjax.features import Batch, FeatureSet, Jagged, Sequence, Sparse
from gemjax.parallel.arrays import to_devices
from gemjax.parallel.mesh import make_mesh
from gemjax.train.programs import measured
from gemjax.train.state import make_trainer
from gemjax.train.step import bucket_step

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sharding():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "launch")
    yield importlib.import_module("benchmarks.sharding")


def make_config(**embedding) -> Config:
  return Config(name="test", embedding=Embedding(dim=4, **embedding), model=Fm())


def make_batch(ids_BS: np.ndarray, **sequences: Jagged) -> Batch:
  n = len(ids_BS)
  return Batch(
    dense_BF=np.zeros((n, 0), np.float32),
    ids_BS=ids_BS.astype(np.int32),
    label_BT=np.zeros((n, 1), np.float32),
    weight_B=np.ones(n, np.float32),
    group_B=np.full(n, -1, np.int32),
    oracle_BT=np.zeros((n, 0), np.float32),
    sequences=sequences,
  )


# One table of 768 rows on two devices: row i has the position 475 i mod 768, thus rows 1, 3 and 6
# (positions 475, 657, 546) lie on the second device, rows 0 and 2 (0, 182) on the first.
ONE_TABLE = FeatureSet(sparse=(Sparse(name="u", table="u", size=768),))
# The first device wants row 0 of itself, 1 and 3 of the other; the second 0 and 2 of the other, 6
# of itself. So 4 remote rows of 4 numbers, there and back: 4 * 4 * 2 * 4 = 128 bytes.
BY_HAND = make_batch(np.array([[1], [1], [3], [0], [0], [2], [2], [6]]))


def test_counts_of_a_case_done_by_hand(sharding):
  figures = sharding.measure(
    make_config(placement={"u": "row"}), ONE_TABLE, 1, 2, iter([BY_HAND] * 3)
  )
  # The largest bucket has 2 rows, with its margin ceil(17 / 8 + 2 sqrt(2) + 1) = 6. Two devices
  # send 6 slots each way: 2 * 6 * 4 * 2 * 4 = 384 bytes, and 2 * 6 * 4 = 48 of ids.
  assert figures == {
    "bytes_over_minimum": 3.0,
    "rounds": {"mean": 1.0, "max": 1},
    "padding_share": 1 - 6 / 24,
    "event_padding_share": None,
    "id_bytes_over_minimum": 48 / 128,
    "replicated_bytes_over_minimum": 0.0,
    "data_bytes_over_minimum": 0.0,
    "all_bytes_over_minimum": 3.0 + 48 / 128,
    "minimum_megabytes": 64e-6,
    "unique_over_lookups": 6 / 8,
    "largest_over_mean_bucket": 2 / 1.5,
    "program_over_counted": 1.0,
  }


def test_further_rounds_are_counted(sharding):
  config = make_config(placement={"u": "row"}, exchange_rows=1)
  figures = sharding.measure(config, ONE_TABLE, 1, 2, iter([BY_HAND] * 2))
  # A bucket of two rows and slots for one: two rounds of 2 slots and no slot to spare. The ids of
  # the second are sent twice.
  assert figures["rounds"] == {"mean": 2.0, "max": 2}
  assert figures["bytes_over_minimum"] == 1.0
  assert figures["padding_share"] == 1 - 6 / 8
  assert figures["id_bytes_over_minimum"] == 3 * 2 * 4 / 128


def test_one_device_exchanges_nothing(sharding):
  figures = sharding.measure(
    make_config(placement={"u": "row"}), ONE_TABLE, 1, 1, iter([BY_HAND] * 2)
  )
  nothing = {k for k, v in figures.items() if v is None}
  assert {"bytes_over_minimum", "padding_share", "program_over_counted"} <= nothing
  assert figures["rounds"] == {"mean": 0.0, "max": 0}


PLACED = FeatureSet(
  sparse=(
    Sparse(name="user", table="user", size=5_000),
    Sparse(name="item", table="item", size=3_000),
    Sparse(name="wide", table="wide", size=2_000),
    Sparse(name="hour", table="hour", size=26),
  ),
  sequence=(Sequence(name="history", table="item", size=3_000, max_length=9),),
)


def placed_batch(seed: int, devices: int) -> Batch:
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.integers(0, s.size, 16 * devices) for s in PLACED.sparse], 1)
  lengths_B = rng.integers(0, 5, 16 * devices).astype(np.int32)
  lengths_B[:16] = 0  # The first device has no event.
  values_TE = rng.integers(0, 3_000, (devices, 64)).astype(np.int32)
  for values_E, events in zip(values_TE, lengths_B.reshape(devices, -1).sum(1)):
    values_E[events:] = 0
  return make_batch(ids, history=Jagged(values_TE.reshape(-1), lengths_B))


def placed_trainer(data, model, batch):
  config = make_config(placement={"wide": "column"}, units={"wide": 2}, replicated_rows=100)
  mesh = make_mesh(data, model, jax.devices()[: data * model])
  return measured(make_trainer(config, PLACED, 1, mesh), to_devices(mesh, batch))


@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)])
def test_the_largest_bucket_of_numpy_is_that_of_the_program(sharding, mesh):
  data, model = mesh
  trainer = placed_trainer(data, model, placed_batch(0, data * model))
  largest = jax.jit(functools.partial(bucket_step, trainer))
  for seed in range(3):
    batch = placed_batch(seed, data * model)
    wanted = sharding.wanted_rows(trainer.tables.layout, batch, data, model)
    sizes = jax.device_get(largest(to_devices(trainer.mesh, batch)))
    assert {n: w.rows_TL.max() for n, w in wanted.items()} == sizes


@pytest.mark.parametrize(
  "mesh, replicas",
  [
    ((2, 4), "exact"),
    ((2, 4), "average"),
    pytest.param((1, 4), "exact", marks=pytest.mark.slow),
    pytest.param((8, 1), "exact", marks=pytest.mark.slow),
  ],
)
def test_bytes_by_collective_are_those_of_the_compiled_step(sharding, mesh, replicas):
  data, model = mesh
  batch = placed_batch(0, data * model)
  trainer = placed_trainer(data, model, batch)
  config = dataclasses.replace(trainer.tables.config, replicas=replicas)
  tables = dataclasses.replace(trainer.tables, config=config)
  trainer = dataclasses.replace(trainer, tables=tables)
  counted = {}
  for rounds in (1, 2):
    by_kind = counted[rounds] = Counter()
    for (kind, _), n in sharding.count_bytes(tables, batch, {"row4": rounds}).items():
      by_kind[kind] += n
  program = sharding.program_bytes(trainer, batch)
  assert counted[1].total() > 0 and program[False] == counted[1]
  assert program[True] == counted[2] - counted[1]  # What one more round moves.


@pytest.mark.parametrize("kind", [pytest.param("uniform", marks=pytest.mark.slow), "zipf"])
def test_bytes_are_near_the_least(sharding, monkeypatch, kind):
  monkeypatch.setattr(sharding, "EXAMPLES", 512)
  batches = (sharding.draw_batch(kind, t, 8) for t in range(7))
  config = Config(name="test", embedding=Embedding(dim=64), model=Fm())
  figures = sharding.measure(config, sharding.features(), 1, 8, batches)
  assert 1 <= figures["bytes_over_minimum"] <= 1.3
  assert figures["rounds"]["mean"] >= 1
  assert 0 < figures["padding_share"] < 0.3 and 0 < figures["event_padding_share"] < 0.5


@pytest.mark.slow
def test_the_binary_makes_its_devices_and_writes_the_figures(tmp_path):
  code = f"""
import runpy, sys
from benchmarks import sharding
sharding.MESHES, sharding.KINDS = {{"2": (1, 2)}}, ("zipf",)
sharding.EXAMPLES, sharding.BATCHES = 64, 1
sys.argv = ["benchmark", "--suite=sharding", "--json={tmp_path}/figures.json"]
runpy.run_path("launch/benchmark.py", run_name="__main__")
"""
  kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  paths = os.pathsep.join(map(str, [ROOT, ROOT / "launch"]))
  done = subprocess.run(
    [sys.executable, "-c", code], env=kept | {"PYTHONPATH": paths}, cwd=ROOT, text=True,
    capture_output=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  figures = json.loads((tmp_path / "figures.json").read_text())
  assert figures["bytes_over_minimum"]["2"]["zipf"] >= 1
  assert figures["rounds"]["2"]["zipf"]["mean"] >= 1
  assert 0 < figures["padding_share"]["2"]["zipf"] < 1
  assert any(line.split()[:2] == ["bytes_over_minimum", "2"] for line in done.stdout.splitlines())
