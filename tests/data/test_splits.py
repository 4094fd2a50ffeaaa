"""Which row goes to train, valid and test."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from oracle import columns, mix
from userrows import SCHEMA, make_rows, run, simple

from gemjax.data.preparation import prepare
from gemjax.data.schema import SplitRule
from gemjax.data.schema_file import load_schema


def numbered(path, n):
  pl.DataFrame({"y": [0] * n, "x": [str(i) for i in range(n)]}).write_csv(path)


def members(data, split):
  """The values of column x that went to a split, via a dense copy of it."""
  d = data.features.dense[0]
  return np.round(columns(data, split)["dense"][:, 0] * d.std + d.mean).astype(int).tolist()


def test_split_by_order_and_at_random(tmp_path):
  numbered(tmp_path / "d.csv", 1000)
  for by in ("order", "random"):
    (tmp_path / "s.toml").write_text(simple(by=by).replace("sparse", "dense"))
    args = ("table", tmp_path / "d.csv", tmp_path / by, tmp_path / "s.toml")
    data = prepare(*args, progress=False)
    parts = [members(data, s) for s in ("train", "valid", "test")]
    assert sorted(x for part in parts for x in part) == list(range(1000))
    if by == "order":
      assert parts == [list(range(800)), list(range(800, 900)), list(range(900, 1000))]
    else:
      expected = [[], [], []]
      for i in range(1000):
        u = mix(i) / 2**64
        expected[(u >= 0.8) + (u >= 0.9)].append(i)
      assert parts == expected and parts[0] != list(range(len(parts[0])))


def test_equal_times_never_part(tmp_path):
  rows = make_rows()
  data = run(tmp_path, rows, SCHEMA + '[columns.when]\nkind = "dense"\n')
  when = {}
  for split in ("train", "valid", "test"):
    d = data.features.dense[-1]
    x = columns(data, split)["dense"][:, -1].astype(float) * d.std + d.mean
    when[split] = (round(x.min()), round(x.max()))
  assert when["train"][1] < when["valid"][0] <= when["valid"][1] < when["test"][0]


def test_times_of_files_in_other_units(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  frame = pl.DataFrame({"y": [0] * 300, "x": range(300)})
  days = pl.from_epoch(pl.Series(range(300)), "d").alias("t")
  kinds = {"a": pl.Date, "b": pl.Datetime("ns"), "c": pl.Datetime("ms")}
  for i, (name, kind) in enumerate(kinds.items()):
    frame.with_columns(days.cast(kind))[i::3].write_parquet(folder / f"{name}.parquet")
  (tmp_path / "s.toml").write_text('time = "t"\n' + simple(by="time").replace("sparse", "dense"))
  data = prepare("table", folder, tmp_path / "out", tmp_path / "s.toml", progress=False)
  parts = [sorted(members(data, s)) for s in ("train", "valid", "test")]
  assert parts == [list(range(240)), list(range(240, 270)), list(range(270, 300))]


def test_split_by_files_fits_on_train_only_and_joins_parts(tmp_path):
  folder = tmp_path / "in"
  (folder / "train").mkdir(parents=True)
  (folder / "train" / "a.csv").write_text("y,x\n0,p\n1,q\n")
  pl.DataFrame({"y": [1], "x": ["q"]}).write_parquet(folder / "train" / "b.parquet")
  (folder / "valid.csv").write_text("y,x\n0,new\n1,q\n")
  (folder / "test.csv").write_text("y,x\n0,p\n0,\n")
  (tmp_path / "s.toml").write_text(simple(by="files"))
  data = prepare("table", folder, tmp_path / "out", tmp_path / "s.toml", progress=False)
  ids = {s: columns(data, s)["ids"][:, 0].tolist() for s in data.splits}
  assert ids == {"train": [3, 2, 2], "valid": [1, 2], "test": [3, 0]}  # q: twice, so row 2.
  assert not data.features.grouped and data.features.tables == {"x": 4}


@pytest.mark.parametrize("seed", [1, -1, 2**31, 10**30])
def test_a_seed_decides_the_random_split(tmp_path, seed):
  numbered(tmp_path / "d.csv", 200)
  (tmp_path / "s.toml").write_text(simple(by="random").replace("sparse", "dense"))
  schema = load_schema(tmp_path / "s.toml")
  schema = dataclasses.replace(schema, split=SplitRule(by="random", seed=seed))
  data = prepare("table", tmp_path / "d.csv", tmp_path / "out", schema, progress=False)
  of = [mix((i + seed * 2**32) % 2**64) / 2**64 for i in range(200)]
  assert members(data, "train") == [i for i in range(200) if of[i] < 0.8]
