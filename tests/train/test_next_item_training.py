"""Training on the next item: the loss by hand, a rule that is learnt, a run that is resumed."""

import json
import math
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemjax.config import Attention, Optimizer
from gemjax.config.next_item import NextItem, Tower
from gemjax.fields import ConfigError
from gemjax.models.next_item import NextItemTower
from gemjax.train import next_item
from gemjax.train.next_item import next_item_loss, train_next_item
from gemjax.train.workdir import WorkdirError

ITEMS, USERS = 20, 40


def small(folder=".", **tower):
  attention = Attention(heads=2, position_buckets=5)
  tower = {"layers": 1, "dim": 16, "hidden": 16, "attention": attention, "negatives": 12} | tower
  return NextItem(
    name="small",
    path=str(folder),
    length=12,
    batch_size=20,
    epochs=30,
    eval_every=15,
    tower=Tower(**tower),
    optimizer=Optimizer(learning_rate=1e-2, schedule="linear"),
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A user's next item is 7 after the one before, and comes once."""
  path = tmp_path_factory.mktemp("raw")
  rng = np.random.default_rng(0)
  lines = []
  for user in range(USERS):
    item = int(rng.integers(ITEMS))
    for t in range(int(rng.integers(6, 16))):
      lines.append(f"{user}::{item}::3::{1000 * user + 60 * t}")
      item = (item + 7) % ITEMS
  (path / "ratings.dat").write_text("\n".join(lines) + "\n")
  return path


@pytest.fixture(scope="module")
def learnt(folder, tmp_path_factory):
  """The summary of a run, its folder, and one with what a kill at its last epoch would leave."""
  path = tmp_path_factory.mktemp("learnt")
  ranks_of_next, calls = next_item.ranks_of_next, []

  def copied(*args):
    calls.append(args)
    if len(calls) == 2:
      checkpoint = "checkpoints/000000030"
      while not (path / "run" / checkpoint).exists():  # It is written beside the training.
        time.sleep(0.01)
      shutil.copytree(path / "run" / checkpoint, path / "killed" / checkpoint)
    return ranks_of_next(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(next_item, "ranks_of_next", copied)
    summary = train_next_item(small(folder), path / "run")
  return path, summary


def born(config, items):
  make = lambda: NextItemTower(config.tower, items=items, length=12, rngs=nnx.Rngs(0))
  return nnx.jit(make)()  # Faster than one operation after the other.


def tower_and_queries(items=50, queries=30):
  tower = born(small(), items)
  tower.item_VD[...] *= 30  # Born small, it would hide a fault.
  tower.popularity_V[...] = jax.random.normal(jax.random.key(4), (items,))
  x_ED = jax.random.normal(jax.random.key(1), (queries, 16))
  next_E = jax.random.randint(jax.random.key(2), (queries,), 0, items).at[-4:].set(-1)
  return tower, x_ED, next_E


def loss_by_hand(tower, x_ED, next_E, shown=None):
  """Of float64 loops; `shown` are the negatives of the sampled softmax."""
  item_VD, b_V, x_ED = map(np.float64, (tower.item_VD[...], tower.popularity_V[...], x_ED))
  items = len(item_VD)
  losses = []
  for x, right in zip(x_ED, np.asarray(next_E)):
    if right < 0:
      continue
    e = lambda v, x=x: math.exp(sum(a * b for a, b in zip(x, item_VD[v])) + b_V[v])
    others = [v for v in (range(items) if shown is None else shown) if v != right]
    each = 1 if shown is None else (items - 1) / len(shown)
    losses.append(-math.log(e(right) / (e(right) + each * sum(e(v) for v in others))))
  return np.mean(losses)


def test_loss_equals_the_formula():
  tower, x_ED, next_E = tower_and_queries()
  found = next_item_loss(tower, x_ED, next_E, None)
  np.testing.assert_allclose(found, loss_by_hand(tower, x_ED, next_E), rtol=1e-5)
  negative_N = jax.random.permutation(jax.random.key(3), 50)[:20]
  found = next_item_loss(tower, x_ED, next_E, negative_N)
  want = loss_by_hand(tower, x_ED, next_E, np.asarray(negative_N).tolist())
  np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("cell", ["hstu", "transformer"])
def test_scores_of_an_event_know_neither_later_events_nor_other_users(cell):
  attention = Attention(heads=2, position_buckets=5, time_buckets=5)
  tower = born(small(cell=cell, layers=2, attention=attention), items=50)
  for block in tower.blocks:  # Biases are born at 0, where they would hide a fault.
    product = block.product if cell == "hstu" else block.attention.product
    for bias in (product.position, product.time):
      bias.table_HN[...] = jax.random.normal(jax.random.key(5), bias.table_HN.shape)
  item_E, offsets_B1 = jnp.arange(16, dtype=jnp.int32), jnp.array([0, 7, 12, 12], jnp.int32)
  age_E = jnp.array([*range(70, 0, -10), *range(50, 0, -10), *[0] * 4], jnp.int32)
  run = nnx.jit(lambda item_E, age_E: tower(item_E, age_E, offsets_B1))
  before = run(item_E, age_E)
  later = run(item_E.at[5:].set(49), age_E.at[6].set(3))
  np.testing.assert_array_equal(before[:5], later[:5])
  assert (before[5] != later[5]).any()
  other = run(item_E.at[:7].set(49), age_E)
  np.testing.assert_array_equal(before[7:12], other[7:12])


def test_a_rule_is_learnt(learnt):
  path, summary = learnt
  assert summary["test"]["hr@10"] > 0.95
  assert summary["test"]["mrr"] > 0.8
  assert summary["test"]["users"] == USERS
  assert json.loads((path / "run/summary.json").read_text()) == summary


def test_a_killed_run_goes_on_to_the_same_weights(folder, learnt, capsys):
  path, whole = learnt
  config = small(folder)
  found = train_next_item(config, path / "killed")
  assert "resuming from the checkpoint of step 30" in capsys.readouterr().out
  assert found["train"]["loss"] == whole["train"]["loss"]
  assert found["test"] == whole["test"]
  config.seed = 1
  with pytest.raises(WorkdirError, match=r"config.seed was 0 and is now 1; name another --workdir"):
    train_next_item(config, path / "killed")


def test_a_field_outside_its_law_is_named():
  config = small()
  config.tower.attention.heads = 3
  with pytest.raises(ConfigError, match=r"heads is 3, but must be a divisor of the width 16"):
    config.validate()
  config = small()
  config.split = "train"
  with pytest.raises(ConfigError, match=r"config.split is 'train', but must be one of test, valid"):
    config.validate()
