"""Every mesh trains models of histories to the losses of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from gemjax import config as c
from gemjax.features import Batch, Dense, EventColumn, Events, FeatureSet, History, Sparse
from gemjax.layers import mlp
from gemjax.parallel import placement
from gemjax.parallel.arrays import to_devices
from gemjax.parallel.mesh import make_mesh
from gemjax.train.programs import Programs
from gemjax.train.state import make_trainer

B, STEPS = 32, 5
ITEM, ACTION = EventColumn(name="item", size=3_000, table="item"), 6
FEATURES = FeatureSet(
  dense=(Dense(name="price"),),
  sparse=(
    Sparse(name="user", size=5_000, table="user"),
    Sparse(name="item", size=3_000, table="item"),
    Sparse(name="surface", size=5, table="surface"),
  ),
  history=(
    History(
      name="views",
      columns=(ITEM, EventColumn(name="action", size=ACTION, table="action")),
      max_length=12,
    ),
    History(name="buys", columns=(ITEM,), max_length=6),
  ),
  tasks=("click", "buy"),
)
RATES = {"dropout": 0.1, "feature_dropout": 0.1}
ATTENTION = c.Attention(heads=2, rope=100.0, qk_norm=True)
GEM = c.Gem(
  layers=2, fmb_units=4, lcb_units=4, rank=4, mlp=(8,), memory_units=2, strides=(1, 4),
  fine=c.Attention(heads=2, block=4, rope=100.0, qk_norm=True), coarse=ATTENTION, cls=2, pma=1,
  recent=2, domain="surface", head=(8,), **RATES,
)  # fmt: skip
INTERFORMER = c.InterFormer(
  layers=1, cls=2, pma=1, recent=2, attention=ATTENTION, rank=4, mlp=(8,), head=(8,), **RATES
)
COARSE = dataclasses.replace(GEM, strides=(4,), recent=0, next_event=0.5)
# Model, histories, mesh. Compilation, nearly all of the time, grows with every branch.
CASES = [
  pytest.param(COARSE, 1, (2, 4), id="gem of one branch-2x4"),
  pytest.param(COARSE, 2, (2, 4), id="gem of two branches-2x4", marks=pytest.mark.slow),
  pytest.param(GEM, 1, (2, 4), id="gem-2x4", marks=pytest.mark.slow),
  pytest.param(GEM, 1, (8, 1), id="gem-8x1", marks=pytest.mark.slow),
  pytest.param(GEM, 1, (1, 8), id="gem-1x8", marks=pytest.mark.slow),
  pytest.param(INTERFORMER, 2, (2, 4), id="interformer-2x4", marks=pytest.mark.slow),
]


def make_config(model) -> c.Config:
  return c.Config(
    name="histories",
    data=c.Data(batch_size=B),
    embedding=c.Embedding(dim=8, dense_mlp=(8,), init_scale=0.1, learning_rate=0.02, l2=1e-3),
    model=model,
    optimizer=c.Optimizer(learning_rate=1e-3, clip_norm=1.0, l2=1e-4),
    train=c.Train(task_weights={"buy": 0.5}),
  )


def make_batch(features, t, shards, room=1) -> Batch:
  """The same examples for every mesh; only the packing of events follows the devices.

  They have `room` times as many slots as they could need.
  """
  rng = np.random.default_rng(t)
  draw = lambda size, *shape: np.minimum(rng.zipf(1.2, shape), size) - 1
  ids = np.stack([draw(f.size, B) for f in features.sparse], 1)
  click = (np.sin(ids[:, 0] * 1.7) + rng.normal(size=B) > 0).astype(np.float32)
  histories = {}
  for history in features.history:
    lengths = rng.integers(0, history.max_length + 1, B)
    lengths[: B // 8] = 0  # The first device of eight has no events.
    slots = room * history.max_length
    events = np.stack([draw(column.size, lengths.sum()) for column in history.columns], 1)
    ages = np.exp(rng.uniform(0, 17, lengths.sum())).astype(np.int32)
    histories[history.name] = Events(
      *(packed(x, lengths, slots, shards) for x in (events.astype(np.int32), ages)),
      lengths.astype(np.int32),
    )
  return Batch(
    dense_BF=rng.normal(size=(B, 1)).astype(np.float32),
    ids_BS=ids.astype(np.int32),
    label_BT=np.stack([click, click * (rng.random(B) < 0.3)], 1).astype(np.float32),
    weight_B=(np.arange(B) < B - 3).astype(np.float32),
    group_B=np.zeros(B, np.int32),
    oracle_BT=np.zeros((B, 0), np.float32),
    sequences={},
    histories=histories,
  )


def packed(x_E, lengths, slots, shards):
  """The events of each shard's examples at the front of its slots."""
  out = np.zeros((shards, B * slots // shards, *x_E.shape[1:]), np.int32)
  ends = np.cumsum([0, *lengths.reshape(shards, -1).sum(1)])
  for s, part in enumerate(out):
    part[: ends[s + 1] - ends[s]] = x_E[ends[s] : ends[s + 1]]
  return out.reshape(-1, *x_E.shape[1:])


def run(model, histories, data, model_axis, lookup="exact", rooms=(1,) * (STEPS + 1)):
  """(losses, the state after the last step); every room has one program."""
  features = dataclasses.replace(FEATURES, history=FEATURES.history[:histories])
  mesh = make_mesh(data, model_axis, jax.devices()[: data * model_axis])
  config = make_config(model)
  config.embedding.lookup = lookup
  trainer = make_trainer(config, features, STEPS, mesh)
  programs = Programs(trainer)
  batches = (
    to_devices(mesh, make_batch(features, t, mesh.size, room)) for t, room in enumerate(rooms)
  )
  state, upcoming = trainer.born(), next(batches)
  ahead, losses = programs.ahead(state, upcoming), []
  for _ in range(STEPS):
    batch, upcoming = upcoming, next(batches)
    state, ahead, report = programs.step(state, ahead, batch, upcoming)
    losses.append(float(report.loss))
  assert programs.compilations == len(set(rooms[:-1]))
  return np.array(losses), jax.device_get(state)


@pytest.fixture(scope="module", autouse=True)
def smooth():
  """Small kernels are sharded, too, and no kink turns a rounding into another gradient."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "SMALLEST_SHARDED", 1)
    patch.setattr(jax.nn, "relu", jax.nn.silu)
    patch.setattr(mlp, "relu", jax.nn.silu)
    yield


@pytest.fixture(scope="module")
def one(smooth):
  """(model, histories) -> what comes of it on one device."""
  found = {}

  def of(model, histories):
    key = repr(model), histories
    if key not in found:
      found[key] = run(model, histories, 1, 1)
    return found[key]

  return of


@pytest.mark.parametrize(("model", "histories", "mesh"), CASES)
def test_losses_and_tables_are_those_of_one_device(one, model, histories, mesh):
  expected, expected_state = one(model, histories)
  losses, state = run(model, histories, *mesh)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  for name in ("params", "stacks"):
    wanted = jax.tree.leaves(getattr(expected_state, name))
    for (path, array), other in zip(
      jax.tree_util.tree_leaves_with_path(getattr(state, name)), wanted
    ):
      where = name + jax.tree_util.keystr(path)
      np.testing.assert_allclose(array, other, rtol=1e-3, atol=1e-4, err_msg=where)


@pytest.mark.parametrize("lookup", [pytest.param("exact", marks=pytest.mark.slow), "ahead"])
def test_rooms_that_come_and_go_change_no_loss(lookup):
  """Behind every room stands a smaller, an equal and a larger one; what is owed has one, too."""
  model = c.Din(hidden=(8,), head=(8,))
  expected, _ = run(model, 2, 1, 2, lookup)
  losses, _ = run(model, 2, 1, 2, lookup, rooms=(1, 2, 1, 1, 2, 2))
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_a_run_that_goes_on_has_the_room_that_it_had():
  """On its mesh it measures no batch; on another one it does."""
  mesh = make_mesh(1, 2, jax.devices()[:2])
  trainer = make_trainer(make_config(c.Din(hidden=(8,), head=(8,))), FEATURES, STEPS, mesh)
  measured = []

  def programs(before=None):
    def batch():
      measured.append(before)
      return to_devices(mesh, make_batch(FEATURES, len(measured), mesh.size))

    made = Programs(trainer)
    made.measure(batch, before)
    return made.exchange

  first = programs()
  assert first["rows"] and first["mesh"] == {"data": 1, "model": 2}
  wider = first | {"rows": {name: 2 * room for name, room in first["rows"].items()}}
  assert programs(wider) == wider and len(measured) == 1
  elsewhere = wider | {"mesh": {"data": 2, "model": 1}}
  assert programs(elsewhere)["rows"].keys() == first["rows"].keys()
  assert len(measured) == 2
