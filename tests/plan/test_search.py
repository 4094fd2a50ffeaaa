"""The search over plans, with plans whose figures are given."""

import types

import pytest

from gemjax import config as c
from gemjax.features import FeatureSet, Sparse
from gemjax.plan import search as search_lib
from gemjax.plan import target

FEATURES = FeatureSet(sparse=(Sparse(name="user", size=3_000_000, table="user"),))
TOPOLOGY = target.parse_topology("h100:2x8")


def config(model=None):
  return c.Config(name="x", embedding=c.Embedding(dim=64), model=model or c.Wukong(layers=3))


@pytest.fixture
def planner(monkeypatch):
  """Plans of which a test says (bytes, seconds) by mesh and config."""
  calls = []

  def install(cost):
    def plan(config, features, topology, mesh):
      calls.append((mesh, config.train.float8_mlp, config.memory))
      held, seconds = cost(config, mesh)
      trainer = types.SimpleNamespace(
        config=config, mesh=types.SimpleNamespace(shape=dict(zip(("data", "model"), mesh)))
      )
      return types.SimpleNamespace(
        trainer=trainer,
        budget=types.SimpleNamespace(total=held),
        estimate=types.SimpleNamespace(seconds=seconds),
      )

    monkeypatch.setattr(search_lib, "plan_training", plan)
    return calls

  return install


def test_the_fastest_that_fits_is_taken_and_8_bits_where_they_are_faster(planner):
  seconds = {(16, 1): 1.0, (8, 2): 3.0, (4, 4): 2.0, (2, 8): 4.0}
  held = {(16, 1): 90e9}
  calls = planner(
    lambda config, mesh: (held.get(mesh, 50e9), seconds[mesh] - 0.5 * config.train.float8_mlp)
  )
  lines = []
  best = search_lib.search(config(), FEATURES, TOPOLOGY, lines.append)
  assert best.trainer.mesh.shape == {"data": 4, "model": 4} and best.trainer.config.train.float8_mlp
  assert [mesh for mesh, *_ in calls] == [*seconds, (4, 4)] and len(lines) == len(calls)
  assert "does not fit" in lines[0] and "products in 8 bits" in lines[-1]


def test_activations_are_made_smaller_only_where_nothing_fits(planner):
  sizes = {"computed": 100e9, "float8": 80e9}
  calls = planner(lambda config, mesh: (sizes[config.memory.activations], 1.0))
  best = search_lib.search(config(), FEATURES, TOPOLOGY, lambda line: None)
  assert best.trainer.config.memory.activations == "float8"
  assert not any(memory.recomputed_layers for *_, memory in calls)


def test_where_nothing_fits_the_least_is_named(planner):
  planner(lambda config, mesh: ((120 - 3 * config.memory.recomputed_layers) * 1e9, 1.0))
  with pytest.raises(target.PlanError, match=r"nothing fits: the least is 111\.00 GB of 84\.93 GB"):
    search_lib.search(config(), FEATURES, TOPOLOGY, lambda line: None)


def test_other_models_have_meshes_alone(planner):
  calls = planner(lambda config, mesh: (1e9, 1.0))
  search_lib.search(config(c.Mlp()), FEATURES, TOPOLOGY, lambda line: None)
  assert len(calls) == search_lib.MESHES


def test_meshes_begin_where_the_tables_fit():
  features = FeatureSet(sparse=(Sparse(name="user", size=1_000_000_000, table="user"),))
  # 256 GB of rows and 8 of their state.
  assert search_lib.meshes(config(), features, TOPOLOGY) == [(4, 4), (2, 8), (1, 16)]
