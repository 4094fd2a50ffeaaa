"""A run made to fit another config: old values where both reach, a newborn run's beyond."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import small
from runs import config_of, convert, logits, restored

from gemjax.convert import ConvertError
from gemjax.convert.run_folder import open_run, write_workdir
from gemjax.convert.tensors import of_array
from gemjax.convert.training_state import parts
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


VALUES = [f"v{i}" for i in range(24)]


def user_data(path, size, encoding="vocabulary", *, values=None, seed=0, digest="", table="user"):
  user = Sparse(name="user", size=size, table=table, encoding=encoding, hash_seed=seed)
  features = FeatureSet(
    dense=small.features().dense, tasks=("click",), sparse=(user,), vocabularies=digest
  )
  vocabularies = {table: values} if values else None
  return small.write_data(path, {"user": size}, features=features, vocabularies=vocabularies)


def empty_run(path, data):
  """Of zeros, for what is decided before any value is read."""
  run = open_run(config_of("gemjax", data, layers=1))
  zeros = {p.name: of_array(np.zeros(p.shape, p.dtype)) for p in parts(run.trainer)}
  write_workdir(path, run._replace(tensors=zeros))
  return path


def fitted(run, data, output, **options):
  """The line of what became of the table's rows."""
  config = config_of("gemjax", data, layers=1)
  lines = convert("gemjax", "gemjax", run, output, config=config, dry_run=True, **options)
  return next(line for line in lines if line.startswith("tables.") and ".rows" in line)


def test_hashes_of_other_values_are_refused(tmp_path):
  """No row of the new table stands for what a row of the old one stood for."""
  run = empty_run(tmp_path / "run", user_data(tmp_path / "old", 26, "hash"))
  for encoding, size, seed, words in (
    ("hash", 38, 0, ("a hash of 26 rows, seed 0", "a hash of 38 rows, seed 0", "multiple of 24")),
    ("hash", 26, 1, ("a hash of 26 rows, seed 1", "prepare it with seed 0")),
    ("hash", 74, 1, ("a hash of 74 rows, seed 1", "prepare it with seed 0")),
    ("hash", 14, 0, ("a hash of 14 rows, seed 0", "multiple of 24")),
    ("vocabulary", 26, 0, ("a vocabulary of 26 rows", "prepare it as hash")),
  ):
    new = user_data(tmp_path / f"{encoding}{size}.{seed}", size, encoding, seed=seed)
    with pytest.raises(ConvertError, match="table 'user' is a hash of 26 rows") as caught:
      fitted(run, new, tmp_path / "out")
    assert all(word in str(caught.value) for word in (*words, str(new))), caught.value
    assert "\n" not in str(caught.value)
  same = user_data(tmp_path / "same", 26, "hash", digest="of another table")
  assert fitted(run, same, tmp_path / "out").endswith("copied")
  renamed = user_data(tmp_path / "renamed", 38, "hash", table="user2")
  assert fitted(run, renamed, tmp_path / "out").endswith("initialised")


def test_a_vocabulary_that_cannot_be_matched_is_refused(tmp_path):
  """Its old folder is gone, or was prepared again in its place; put back, it is matched."""
  old = user_data(tmp_path / "old", 26, values=VALUES, digest="a")
  run = empty_run(tmp_path / "run", old)
  hashed = user_data(tmp_path / "hashed", 26, "hash")
  with pytest.raises(ConvertError, match=r"a vocabulary of 26 rows .* prepare it as vocabulary"):
    fitted(run, hashed, tmp_path / "out")
  grown = user_data(tmp_path / "grown", 28, values=["new", *VALUES[::-1], "last"], digest="b")
  turned = user_data(tmp_path / "turned", 26, values=VALUES[::-1], digest="c")
  assert "copied by value" in fitted(run, grown, tmp_path / "out")
  assert fitted(run, turned, tmp_path / "out").endswith("copied by value")
  moved = shutil.move(old, tmp_path / "moved")
  for again in (None, grown):
    if again:
      shutil.copytree(again, old)
    for new in (grown, turned):
      with pytest.raises(ConvertError, match="'user' is a vocabulary of 26 rows") as caught:
        fitted(run, new, tmp_path / "out")
      assert all(str(x) in str(caught.value) for x in (old, run / "data", new, "digest 'a'"))
  # The same vocabularies at another place say so by their digest.
  assert fitted(run, moved, tmp_path / "out").endswith("copied")
  (moved / "vocabularies.json").rename(tmp_path / "kept.json")
  assert fitted(run, moved, tmp_path / "out").endswith("copied")
  (tmp_path / "kept.json").rename(moved / "vocabularies.json")
  shutil.copytree(moved, run / "data")
  assert "copied by value" in fitted(run, grown, tmp_path / "out")
  (grown / "vocabularies.json").unlink()
  with pytest.raises(ConvertError, match=f"in {grown}, but no vocabularies.json is there"):
    fitted(run, grown, tmp_path / "out")


def test_tables_with_dots_in_their_names(tmp_path):
  """`user` grows by value, `user.rows`, whose tensors' names begin likewise, is copied."""

  def data(name, values, digest):
    sizes = {"user": len(values) + 2, "user.rows": 26}
    features = FeatureSet(
      dense=small.features().dense, tasks=("click",), vocabularies=digest,
      sparse=tuple(Sparse(name=n, size=s, table=n) for n, s in sizes.items()),
    )  # fmt: skip
    vocabularies = {"user": values, "user.rows": VALUES}
    return small.write_data(tmp_path / name, sizes, features=features, vocabularies=vocabularies)

  run = empty_run(tmp_path / "run", data("old", VALUES, "a"))
  config = config_of("gemjax", data("new", [*VALUES[::-1], "new"], "b"), layers=1)
  lines = convert("gemjax", "gemjax", run, tmp_path / "out", config=config, dry_run=True)
  said = {line.split()[0]: line for line in lines}
  assert "copied by value" in said["tables.user.rows"]
  assert said["tables.user.rows.rows"].endswith("copied")
