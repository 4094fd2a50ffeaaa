"""Activations within a budget: what is chosen, and that training stays what it was."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from gemjax import config as c
from gemjax.features import Batch, Dense, EventColumn, FeatureSet, History, Sparse
from gemjax.parallel.mesh import make_mesh
from gemjax.train.activations import activation_bytes, fit_budget, largest_batch
from gemjax.train.devices import open_training
from gemjax.train.state import make_trainer
from gemjax.train.step import plan_step, train_step

FEATURES = FeatureSet(
  dense=(Dense(name="price"),),
  sparse=tuple(Sparse(name=f"f{i}", size=50, table=f"f{i}") for i in range(5)),
)
LAYERS, B = 5, 512


def config(batch_size=B, **memory) -> c.Config:
  return c.Config(
    name="memory",
    data=c.Data(batch_size=batch_size),
    embedding=c.Embedding(dim=32, init_scale=0.3),
    model=c.Wukong(
      layers=LAYERS, fmb_units=16, lcb_units=16, rank=8, mlp=(64,), head=(32,), dropout=0.1
    ),
    memory=c.Memory(**memory),
  )


@functools.cache
def kept(layers: int, activations: str = "computed") -> int:
  mesh = make_mesh(2, 4, jax.devices())
  of = config(recomputed_layers=layers, activations=activations)
  return activation_bytes(make_trainer(of, FEATURES, 1, mesh), largest_batch(of, FEATURES, 8))


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_fewest_layers_that_keep_to_the_budget_are_recomputed(share):
  mesh = make_mesh(2, 4, jax.devices())
  for budget in (share, share * kept(0)):
    layers = fit_budget(config(activation_budget=budget), FEATURES, mesh).memory.recomputed_layers
    assert 0 < layers <= LAYERS
    assert kept(layers) <= share * kept(0) < kept(layers - 1)


def test_a_budget_that_all_keep_to_changes_nothing():
  mesh = make_mesh(2, 4, jax.devices())
  for budget in (1.0, 2.0 * kept(0)):
    assert not fit_budget(config(activation_budget=budget), FEATURES, mesh).memory.recomputed_layers


def test_a_budget_that_nothing_keeps_to_is_refused():
  with pytest.raises(c.ConfigError, match=r"activation_budget is 2, .* with all 5 layers recompu"):
    fit_budget(config(activation_budget=2.0), FEATURES, make_mesh(2, 4, jax.devices()))


def test_a_run_says_how_many_layers_it_computes_again():
  _, chosen, lines = open_training(config(activation_budget=0.6), FEATURES)
  count = chosen.memory.recomputed_layers
  assert count and f"activations: layers computed again: {count}" in lines


def test_activations_grow_with_the_batch_and_8_bits_keep_less():
  mesh = make_mesh(2, 4, jax.devices())
  twice = config(batch_size=2 * B)
  trainer = make_trainer(twice, FEATURES, 1, mesh)
  grown = activation_bytes(trainer, largest_batch(twice, FEATURES, 8))
  assert 1.8 * kept(0) < grown <= 2 * kept(0)  # All but weights cast to the type of the step.
  assert kept(0, "float8") < 0.5 * kept(0) and kept(LAYERS) < 0.5 * kept(0)


@pytest.mark.slow  # Tracing GEM thrice.
def test_sequences_of_gem_keep_less_as_well():
  item = {"size": 100, "table": "item"}
  features = FeatureSet(
    sparse=(Sparse(name="item", **item),),
    history=(History(name="clicks", columns=(EventColumn(name="item", **item),), max_length=64),),
  )
  mesh = make_mesh(1, 1, jax.devices()[:1])

  def kept(**memory):
    of = dataclasses.replace(
      config(64, **memory),
      model=c.Gem(layers=2, fmb_units=8, lcb_units=8, mlp=(64,), head=(32,), cls=2),
      embedding=c.Embedding(dim=64),
      train=c.Train(dtype="bfloat16"),
    )
    of.validate()
    return activation_bytes(make_trainer(of, features, 1, mesh), largest_batch(of, features, 1))

  whole = kept()
  assert kept(recomputed_layers=3) < 0.4 * whole
  assert kept(activations="float8") < 0.7 * whole


@functools.cache
def trained(activations: str, layers: int):
  """(losses of four steps, dense parameters)."""
  of = config(batch_size=64, activations=activations, recomputed_layers=layers)
  trainer = make_trainer(of, FEATURES, 10)
  rng = np.random.default_rng(0)
  batch = Batch(
    dense_BF=rng.normal(size=(64, 1)).astype(np.float32),
    ids_BS=rng.integers(0, 50, (64, 5)).astype(np.int32),
    label_BT=rng.integers(0, 2, (64, 1)).astype(np.float32),
    weight_B=np.ones(64, np.float32),
    group_B=np.zeros(64, np.int32),
    oracle_BT=np.zeros((64, 0), np.float32),
    sequences={},
  )
  state, losses = trainer.born(), []
  plans = jax.jit(functools.partial(plan_step, trainer))(batch)
  step = jax.jit(functools.partial(train_step, trainer))
  for _ in range(4):
    state, plans, report = step(state, plans, batch, batch)
    losses.append(float(report.loss))
  return losses, state.params


def test_recomputed_layers_train_as_before_and_8_bits_nearly():
  losses, params = trained("computed", 0)
  assert losses[-1] < losses[0] - 0.01
  again, same = trained("computed", 3)
  assert again == pytest.approx(losses, rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), same, params)
  assert trained("float8", 0)[0] == pytest.approx(losses, rel=5e-3)
  assert trained("float8", 0)[0] != losses


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model": c.Mlp(), "memory": c.Memory(activations="float8")}, "memory.activations is 'flo"),
    ({"memory": c.Memory(recomputed_layers=6)}, "memory.recomputed_layers is 6, .* at most 5"),
    ({"compilation": c.Compilation(unroll=-1)}, "compilation.unroll is -1"),
    (
      {"model": c.Mlp(), "compilation": c.Compilation(unroll=2)},
      "compilation.unroll is 2, .* other than Wukong and Gem",
    ),
    ({"compilation": c.Compilation(early_sums=True)}, "compilation.early_sums is True, .* below 2"),
    ({"memory": c.Memory(activation_budget=-1.0)}, "memory.activation_budget is -1.0"),
    ({"model": c.Mlp(), "train": c.Train(float8_mlp=True)}, "train.float8_mlp is True"),
  ],
)  # fmt: skip
def test_laws(change, words):
  with pytest.raises(c.ConfigError, match=words):
    dataclasses.replace(config(), **change).validate()


def test_layers_lie_side_by_side_where_the_config_says_so():
  for unroll, early in ((0, False), (3, True)):
    lie = c.Compilation(unroll=unroll, early_sums=early)
    asked = dataclasses.replace(config(), compilation=lie)
    trainer = make_trainer(asked, FEATURES, 10)
    ranker = nnx.merge(trainer.graph, trainer.abstract().params)
    assert (ranker.model.keeping.unroll, ranker.model.keeping.early_sums) == (unroll, early)
