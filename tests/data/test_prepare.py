"""Every encoded value against an oracle in plain Python, and what must not change it."""

import json
import math

import numpy as np
from oracle import columns, hash_text, vocabulary
from userrows import SCHEMA, make_rows, run, simple

from gemjax.data.encoding import Moments
from gemjax.data.preparation import prepare
from gemjax.data.prepared import open_prepared
from gemjax.features import UNLABELLED


def oracle(rows):
  """split -> list of examples, each a dict of what the prepared columns should hold."""
  times = sorted(float(r["when"]) for r in rows)
  cut1, cut2 = times[round(0.8 * len(rows))], times[round(0.9 * len(rows))]
  splits = {"train": [], "valid": [], "test": []}
  for r in rows:
    t = float(r["when"])
    splits["train" if t < cut1 else "valid" if t < cut2 else "test"].append(r)
  train = splits["train"]
  missing = ("", "NA")
  past = lambda r: r["past"].split("|")[-4:] if r["past"] else []
  ads = vocabulary([r["ad"] for r in train if r["ad"]] + [a for r in train for a in past(r)], 3)
  sign_log = lambda x: math.copysign(math.log(1 + abs(x)), x)
  prices = [sign_log(float(r["price"])) for r in train if r["price"] not in missing]
  ages = [float(r["age"]) for r in train if r["age"]]
  mean = lambda xs: math.fsum(xs) / len(xs)
  std = lambda xs: math.sqrt(math.fsum((x - mean(xs)) ** 2 for x in xs) / len(xs))
  price_mean, price_std, age_mean, age_std = mean(prices), std(prices), mean(ages), std(ages)
  users = {}
  out = {}
  for split, members in splits.items():
    out[split] = []
    for r in members:
      no_price = r["price"] in missing
      price = 0 if no_price else (sign_log(float(r["price"])) - price_mean) / price_std
      age = (float(r["age"]) - age_mean) / age_std if r["age"] else 0
      out[split].append(
        {
          "label": [int(r["click"]), int(int(r["stars"]) >= 4)],
          "dense": [price, float(no_price), age],
          "ids": [2 + hash_text(r["user"], 7) % 48, ads.get(r["ad"], 1) if r["ad"] else 0],
          "past": [ads.get(a, 1) for a in past(r)],
          "group": users.setdefault(r["user"], len(users)),
        }
      )
  return out, ads


def test_every_value_equals_the_oracle(tmp_path):
  rows = make_rows()
  data = run(tmp_path, rows)
  expected, ads = oracle(rows)
  f = data.features
  assert [x.name for x in f.dense] == ["price", "price.missing", "age"]
  assert [x.name for x in f.sparse] == ["user", "ad"]
  assert f.tables == {"user": 50, "ad": len(ads) + 2}
  assert f.tasks == ("click", "stars") and f.grouped and f.sequence[0].max_length == 4
  assert any(1 in e["past"] for e in expected["train"]), "the case needs rare values"
  for split, examples in expected.items():
    found = columns(data, split)
    assert len(found["label"]) == len(examples) == data.splits[split].examples
    np.testing.assert_array_equal(found["label"], [e["label"] for e in examples])
    np.testing.assert_array_equal(found["ids"], [e["ids"] for e in examples])
    np.testing.assert_array_equal(found["past.lengths"], [len(e["past"]) for e in examples])
    np.testing.assert_array_equal(found["past.values"], [a for e in examples for a in e["past"]])
    np.testing.assert_allclose(found["dense"], [e["dense"] for e in examples], atol=1e-6)
  # The index of users is by first appearance: which user is which, not which number, is the law.
  for split, examples in expected.items():
    np.testing.assert_array_equal(columns(data, split)["group"], [e["group"] for e in examples])
  stored = json.loads((data.path / "vocabularies.json").read_text())
  assert {v: i + 2 for i, v in enumerate(stored["ad"])} == ads


def test_a_row_without_an_optional_label_is_unlabelled(tmp_path):
  rows = make_rows()
  for i, row in enumerate(rows):
    row["click"] = row["click"] if i % 3 else ""
    row["stars"] = row["stars"] if i % 5 else "NA"
  label = 'kind = "label"\n'
  data = run(tmp_path, rows, schema=SCHEMA.replace(label, label + "optional = true\n"))
  assert data.features.optional == ("click", "stars")
  splits = ("train", "valid", "test")
  found = np.concatenate([columns(data, split)["label"] for split in splits])
  click = lambda r: int(r["click"] or UNLABELLED)
  stars = lambda r: UNLABELLED if r["stars"] == "NA" else int(int(r["stars"]) >= 4)
  expected = [[click(r), stars(r)] for r in rows]
  assert sorted(found.tolist()) == sorted(expected)
  assert [0, UNLABELLED] in expected and [UNLABELLED, 1] in expected
  for task, is_known in (("click", lambda r: r["click"]), ("stars", lambda r: r["stars"] != "NA")):
    told = data.origin["labelled"][task]
    assert list(told) == list(splits)
    assert sum(told.values()) == sum(map(bool, map(is_known, rows))) < len(rows)


def test_mean_and_deviation_are_float64_and_of_train_only(tmp_path):
  rows = make_rows()
  for r in rows:
    r["age"] = str(1e9 + float(r["age"] or 0))  # float32 would lose the deviation.
  f = run(tmp_path, rows).features.dense[-1]
  times = sorted(float(r["when"]) for r in rows)
  ages = [float(r["age"]) for r in rows if float(r["when"]) < times[round(0.8 * len(rows))]]
  np.testing.assert_allclose([f.mean, f.std], [np.mean(ages), np.std(ages)], rtol=1e-12)


def test_a_constant_over_many_chunks_is_stored_as_zero():
  moments = Moments()
  for n in (3, 7, 10):
    moments.add(np.full(n, 0.1))
  assert (moments.mean, moments.std) == (0.1, 1)


def test_missing_column_is_made_only_if_train_misses_and_only_to_keep(tmp_path):
  text = "y,a,b,c\n" + "0,1,1,1\n" * 8 + "0,2,,\n"  # b and c are missing in the last rows only.
  (tmp_path / "d.csv").write_text(text + "0,2,2,2\n")
  kinds = "".join(f'[columns.{n}]\nkind = "dense"\n' for n in "abc")
  schema = '[split]\nby = "order"\n[columns.y]\nkind = "label"\n' + kinds
  (tmp_path / "s.toml").write_text(schema)
  data = prepare("table", tmp_path / "d.csv", tmp_path / "a", tmp_path / "s.toml", progress=False)
  assert [f.name for f in data.features.dense] == ["a", "b", "c"]
  assert [f.std for f in data.features.dense] == [1, 1, 1]  # Constant in train.
  assert columns(data, "valid")["dense"].tolist() == [[1, 0, 0]]  # Missing is the mean.


def test_options_change_every_category(tmp_path):
  rows = make_rows()
  data = run(tmp_path, rows, hash_rows=20)
  assert data.features.tables == {"user": 20, "ad": 20}
  assert all(f.encoding == "hash" for f in data.features.sparse + data.features.sequence)
  data = run(tmp_path, rows, out="count", min_count=1)
  assert data.features.tables["user"] == 50 and data.features.sparse[0].encoding == "hash"
  assert columns(data, "train")["ids"].min() == 0
  assert not (columns(data, "train")["ids"] == 1).any()
  limited = SCHEMA.replace("min_count = 3", "min_count = 3\nrows = 9")
  assert run(tmp_path, rows, limited, out="limit", min_count=1).features.tables["ad"] == 9


def test_rows_limit_keeps_the_most_frequent(tmp_path):
  (tmp_path / "d.csv").write_text(
    "y,x\n" + "0,a\n0,b\n0,b\n0,c\n0,c\n0,c\n0,d\n0,d\n0,d\n0,d\n" * 4
  )
  (tmp_path / "s.toml").write_text(simple(by="order") + "rows = 4\n")
  data = prepare("table", tmp_path / "d.csv", tmp_path / "o", tmp_path / "s.toml", progress=False)
  assert columns(data, "train")["ids"][:10, 0].tolist() == [1, 1, 1, 3, 3, 3, 2, 2, 2, 2]


def test_same_input_same_folder_and_other_values_another_digest(tmp_path):
  rows = make_rows()
  a, b = run(tmp_path, rows), run(tmp_path, rows, out="again")
  names = sorted(p.name for p in a.path.iterdir())
  assert names == sorted(p.name for p in b.path.iterdir())
  for name in names:
    assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), name
  swapped = [r | {"ad": r["ad"].replace("ad1", "ad_1")} for r in rows]
  swapped = [r | {"past": r["past"].replace("ad1", "ad_1")} for r in swapped]
  c = run(tmp_path, swapped, out="other")
  assert c.features.tables == a.features.tables
  assert c.features.vocabularies != a.features.vocabularies
  assert "vocabularies" in a.features.difference(c.features)
  assert open_prepared(a.path).origin["dataset"] == "table"
