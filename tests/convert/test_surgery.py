"""A run made to fit another config: old values where both reach, a newborn run's beyond."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from runs import config_of, convert, logits, restored

from gemjax.data.prepared import open_prepared
from gemjax.features import FeatureSet, Sparse

EMBEDDING = {"l2": 0.1, "dtype": "bfloat16", "learning_rate": 0.3, "init_scale": 0.3}


def rows(trainer, state, table, kind="rows_RW"):
  """In the table's own order."""
  stack, offset = trainer.tables.layout.positions(table)
  at = (offset + np.arange(trainer.features.tables[table])) * stack.multiplier % stack.rows
  found = state.stacks[stack.name]
  return np.asarray(found.rows_RW if kind == "rows_RW" else found.slots[kind])[at]


def test_more_layers_and_wider_ones(trained_run, data, tmp_path):
  """Layer 3 is new, FMB's MLP grows from 8 to 12, the head is cut to (12, 12)."""
  run = tmp_path / "run"
  config = config_of("gemjax", data, EMBEDDING, layers=4, mlp=(12,), head=(12, 12))
  lines = convert("gemjax", "gemjax", trained_run, run, config=config, verify=True)
  said = {line.split()[0]: line for line in lines}
  assert "initialised" in said["model.layers.3.fm.y_NK"]
  assert said["model.layers.0.mlp.layers.0.kernel"].endswith(
    "axis 1 grown from 8, the rest initialised"
  )
  assert "axis 1 cut from 16" in said["model.heads.heads.0.layers.0.kernel"]
  (_, old, _), (trainer, new, _) = restored(trained_run), restored(run)
  born = jax.device_get(trainer.born())
  path = ("model", "layers", "mlp", "layers", 0, "kernel")

  def at(params):
    for key in path:
      params = params[key]
    return np.asarray(params)

  a, b, c = at(old.params), at(new.params), at(born.params)
  assert b.shape == (4, *c.shape[1:]) and a.shape[0] == 3
  np.testing.assert_array_equal(b[:3, :, :8], a)
  np.testing.assert_array_equal(b[:3, :, 8:], c[:3, :, 8:])
  np.testing.assert_array_equal(b[3], c[3])
  for table in ("user", "item", "hour"):
    np.testing.assert_array_equal(
      rows(trainer, new, table, "v"), rows(*restored(trained_run)[:2], table, "v")
    )
  assert np.isfinite(logits(run, "test")).all()


def test_wider_units(trained_run, data, tmp_path):
  """Rows of 12: the first 8 are the old ones, the others those that the run would be born with."""
  run = tmp_path / "run"
  config = config_of("gemjax", data, EMBEDDING | {"dim": 12})
  convert("gemjax", "gemjax", trained_run, run, config=config, verify=True)
  (before, old, _), (trainer, new, _) = restored(trained_run), restored(run)
  born = trainer.born()
  for table in ("user", "item", "hour"):
    a, b, c = rows(before, old, table), rows(trainer, new, table), rows(trainer, born, table)
    np.testing.assert_array_equal(b[:, :8], a)
    np.testing.assert_array_equal(b[:, 8:], c[:, 8:])


@pytest.mark.parametrize("encoding", ["vocabulary", "hash"])
def test_tables_grow_without_forgetting(tmp_path, encoding):
  """A vocabulary in another order with new values; hashes modulo three times as many rows."""
  old_values, hashes = [f"v{i}" for i in range(24)], 24
  if encoding == "vocabulary":
    new_values = ["new0", *reversed(old_values), "new1"]
    size = len(new_values) + 2
  else:
    new_values, size = None, 3 * hashes + 2

  def data(name, size, values):
    features = FeatureSet(
      dense=small.features().dense, tasks=("click",), vocabularies=name,
      sparse=(Sparse(name="user", size=size, table="user", encoding=encoding),),
    )  # fmt: skip
    vocabularies = {"user": values} if values else None
    return small.write_data(
      tmp_path / name, {"user": size}, features=features, vocabularies=vocabularies
    )

  config = config_of("gemjax", data("old", 26, old_values), layers=1)
  from gemjax.train.loop import train

  train(config, tmp_path / "run")
  grown = dataclasses.replace(config, data=dataclasses.replace(config.data))
  grown.data.path = str(data("new", size, new_values))
  lines = convert(
    "gemjax", "gemjax", tmp_path / "run", tmp_path / "grown", config=grown, verify=True
  )
  assert any(line.startswith("tables.user.rows") and "by value" in line for line in lines)
  (before, old, _), (trainer, new, _) = restored(tmp_path / "run"), restored(tmp_path / "grown")
  born = trainer.born()
  for kind in ("rows_RW", "v"):
    a, b, c = (rows(*x, "user", kind) for x in ((before, old), (trainer, new), (trainer, born)))
    assert a.any()
    np.testing.assert_array_equal(b[:2], a[:2])
    if encoding == "vocabulary":
      np.testing.assert_array_equal(b[3:27], a[2:][::-1])
      np.testing.assert_array_equal(b[[2, 27]], c[[2, 27]])
    else:
      h = np.random.default_rng(0).integers(0, 2**62, 1000)
      np.testing.assert_array_equal(b[2 + h % (3 * hashes)], a[2 + h % hashes])
  assert open_prepared(grown.data.path).features.tables["user"] == size
