"""Frappe and Criteo: made-up files in every layout, and the real ones where they are."""

import csv
import gzip
import math
import random

import numpy as np
import pytest
from oracle import PICKED, columns, real, row, vocabulary

from gemjax.data.preparation import prepare, recognise


def test_frappe_real(tmp_path):
  raw = real("frappe_x1")
  assert recognise(raw) == "frappe"
  data = prepare("frappe", raw, tmp_path / "out", progress=False)
  rows = {}
  for split, count in (("train", 202_027), ("valid", 57_722), ("test", 28_860)):
    with open(raw / f"{split}.csv") as file:
      rows[split] = list(csv.DictReader(file))
    assert data.splits[split].examples == len(rows[split]) == count
  names = [f.name for f in data.features.sparse]
  assert names == list(rows["train"][0])[1:]
  tables = {n: vocabulary(r[n] for r in rows["train"]) for n in names}
  users = {}
  for split in rows:
    found = columns(data, split)
    assert found["group"].tolist() == [users.setdefault(r["user"], len(users)) for r in rows[split]]
    for b in [*PICKED, len(rows[split]) - 1]:
      assert found["ids"][b].tolist() == [row(tables[n], rows[split][b][n]) for n in names]
    assert found["label"][:, 0].tolist() == [int(r["label"]) for r in rows[split]]


def check_criteo(data, rows, splits, picked):
  """`rows` are lists of 40 texts, `splits` the split of each."""
  sign_log = lambda x: math.copysign(math.log(1 + abs(float(x))), float(x))
  train = [r for r, s in zip(rows, splits) if s == "train"]
  tables = [vocabulary((r[c] for r in train), 2) for c in range(14, 40)]
  assert [f.size for f in data.features.sparse] == [len(t) + 2 for t in tables]
  dense = {f.name: f for f in data.features.dense}
  values = {f"i{c}": [sign_log(r[c]) for r in train if r[c]] for c in range(1, 14)}
  for name, x in values.items():
    mean = math.fsum(x) / len(x)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
    np.testing.assert_allclose([dense[name].mean, dense[name].std], [mean, std], rtol=1e-9)
    assert (f"{name}.missing" in dense) == (len(x) < len(train))
  for split in ("train", "valid", "test"):
    mine = [r for r, s in zip(rows, splits) if s == split]
    found = columns(data, split)
    assert found["label"][:, 0].tolist() == [int(r[0]) for r in mine]
    for b in picked:
      r = mine[b % len(mine)]
      expected = []
      for f in data.features.dense:
        text = r[int(f.name.removesuffix(".missing")[1:])]
        missing = float(not text)
        z = (sign_log(text) - f.mean) / f.std if text else 0.0
        expected.append(missing if f.name.endswith(".missing") else z)
      np.testing.assert_allclose(found["dense"][b % len(mine)], expected, atol=1e-6)
      assert found["ids"][b % len(mine)].tolist() == [row(t, v) for t, v in zip(tables, r[14:])]


def test_criteo_kaggle_real(tmp_path):
  raw = real("criteo_kaggle_sample")
  rows = [x.split("\t") for x in next(raw.glob("*.txt")).read_text().splitlines()]
  assert recognise(raw) == recognise(next(raw.glob("*.txt"))) == "criteo-kaggle"
  data = prepare("criteo-kaggle", raw, tmp_path / "out", progress=False)
  splits = ["train"] * 8000 + ["valid"] * 1000 + ["test"] * 1000
  check_criteo(data, rows, splits, PICKED)


def test_criteo_1tb_real(tmp_path):
  import pyarrow.parquet as pq

  raw = real("criteo_1tb_sample")
  table = pq.read_table(next(raw.glob("*.parquet")))
  lists = [table[n].to_pylist() for n in table.column_names]
  rows = [["" if v is None else str(v) for v in r] for r in zip(*lists)]
  assert recognise(raw) == "criteo-1tb"
  data = prepare("criteo-1tb", raw, tmp_path / "out", progress=False)
  splits = [split_at_random(b) for b in range(len(rows))]
  check_criteo(data, rows, splits, PICKED)


def split_at_random(number):
  """splitmix64 of the row's number, in Python's own integers."""
  x = (number + 0x9E3779B97F4A7C15) % 2**64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
  x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
  u = (x ^ x >> 31) / 2**64
  return "train" if u < 0.8 else "valid" if u < 0.8 + 0.1 else "test"


def criteo_lines(n=300, seed=0):
  rng = random.Random(seed)
  number = lambda: rng.choice(["", str(rng.randint(-2, 5000))])
  word = lambda: rng.choice(["", f"{rng.randint(0, 30):08x}"])
  return [
    [str(rng.randint(0, 1)), *(number() for _ in range(13)), *(word() for _ in range(26))]
    for _ in range(n)
  ]


def test_criteo_made_up(tmp_path):
  rows = criteo_lines()
  text = "".join("\t".join(r) + "\n" for r in rows)
  (tmp_path / "kaggle").mkdir()
  (tmp_path / "kaggle" / "train.txt").write_text(text)
  data = prepare("criteo-kaggle", tmp_path / "kaggle", tmp_path / "a", progress=False)
  check_criteo(data, rows, ["train"] * 240 + ["valid"] * 30 + ["test"] * 30, range(300))
  # The raw days of Criteo 1TB have the same format; rows are numbered through all files.
  (tmp_path / "days").mkdir()
  half = len(text.splitlines()) // 2
  for day, lines in ((0, rows[:half]), (1, rows[half:])):
    days = "".join("\t".join(r) + "\n" for r in lines)
    (tmp_path / "days" / f"day_{day}").write_text(days)
  data = prepare("criteo-1tb", tmp_path / "days", tmp_path / "b", progress=False)
  check_criteo(data, rows, [split_at_random(b) for b in range(300)], range(300))


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz", "day_0", "day_0.gz"])
def test_criteo_is_recognised_by_every_name_it_is_read_by(tmp_path, name):
  text = "\n".join("\t".join(r) for r in criteo_lines(20)).encode()
  (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
  dataset = "criteo-1tb" if name.startswith("day") else "criteo-kaggle"
  assert recognise(tmp_path) == recognise(tmp_path / name) == dataset


def test_criteo_short_line(tmp_path):
  rows = criteo_lines(20)
  text = "".join("\t".join(r) + "\n" for r in rows[:12]) + "\t".join(rows[12][:-3]) + "\n"
  (tmp_path / "train.txt").write_text(text)
  with pytest.raises(ValueError, match=r"train.txt, line 13 has 37 columns, but 40 are expected"):
    prepare("criteo-kaggle", tmp_path, tmp_path / "out", progress=False)


def test_frappe_without_a_field(tmp_path):
  for split in ("train", "valid", "test"):
    (tmp_path / f"{split}.csv").write_text("label,user,item,daytime,city\n1,2,3,4,5\n")
  assert recognise(tmp_path) == "frappe"
  with pytest.raises(ValueError, match=r"train.csv has no column 'weekday', only"):
    prepare("frappe", tmp_path, tmp_path / "out", progress=False)
  (tmp_path / "valid.csv").unlink()
  with pytest.raises(ValueError, match=r"valid.csv does not exist"):
    prepare("frappe", tmp_path, tmp_path / "out", progress=False)
