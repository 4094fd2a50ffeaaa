"""Every encoded value against an oracle in plain Python, and what must not change it."""

import collections
import dataclasses
import gzip
import json
import math
import random
import struct

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemjax.data import raw
from gemjax.data.block_reader import BlockReader
from gemjax.data.encoding import Moments
from gemjax.data.preparation import prepare
from gemjax.data.prepared import concatenate, open_prepared
from gemjax.data.vocabulary import Counter, Vocabulary, hash_texts

SCHEMA = """
user = "user"
time = "when"
missing_values = ["", "NA"]
[split]
by = "time"
[columns.click]
kind = "label"
[columns.stars]
kind = "label"
threshold = 4.0
[columns.price]
kind = "dense"
transform = "log1p"
[columns.age]
kind = "dense"
missing = "mean"
[columns.user]
kind = "sparse"
encoding = "hash"
rows = 50
seed = 7
[columns.ad]
kind = "sparse"
min_count = 3
[columns.past]
kind = "sequence"
separator = "|"
max_length = 4
table = "ad"
min_count = 3
"""
NAMES = ["click", "stars", "price", "age", "user", "ad", "past", "when", "unused"]


def make_rows(n=700, seed=0):
  """Rows as a user has them: texts, "" or "NA" for missing, times unsorted and with ties."""
  rng = random.Random(seed)
  ads = [f"ad{i}" if i % 3 else f"é{i} ünïcode-longer-than-8-bytes" for i in range(60)]
  pick = lambda: ads[min(int(rng.expovariate(0.08)), 59)]
  return [
    {
      "click": str(rng.randint(0, 1)),
      "stars": str(rng.randint(1, 5)),
      "price": rng.choice(["", "NA", f"{rng.gauss(0, 50):.3f}", "0", "-7"]),
      "age": "" if rng.random() < 0.1 else str(rng.randint(1, 90)),
      "user": str(rng.randint(1, 30)),
      "ad": "" if rng.random() < 0.05 else pick(),
      "past": "|".join(pick() for _ in range(rng.randint(0, 7))),
      "when": str(rng.randint(0, 200)),
      "unused": "x",
    }
    for _ in range(n)
  ]


def write_csv(path, rows, names=NAMES, end="\n"):
  lines = [",".join(names), *(",".join(r[n] for n in names) for r in rows)]
  path.write_bytes((end.join(lines) + end).encode())


def run(folder, rows, schema=SCHEMA, name="data.csv", out="out", write=write_csv, **options):
  write(folder / name, rows)
  (folder / "schema.toml").write_text(schema)
  return prepare(
    "table", folder / name, folder / out, folder / "schema.toml", progress=False, **options
  )


def columns(data, split):
  reader = BlockReader(data, split)
  return concatenate([reader.read(b) for b in range(len(reader.sizes))])


def equal(a, b):
  """The same data up to the rounding of a mean and the numbers of users.

  Both depend on where the stream was cut, and so on the format; which rows share a user does not.
  """
  plain = lambda f: [[d.name for d in f.dense], dataclasses.replace(f, dense=())]
  assert plain(a.features) == plain(b.features)
  users = {}
  for split in ("train", "valid", "test"):
    x, y = columns(a, split), columns(b, split)
    assert x.keys() == y.keys()
    assert all(users.setdefault(u, v) == v for u, v in zip(x.pop("group"), y.pop("group")))
    np.testing.assert_allclose(x.pop("dense"), y.pop("dense"), rtol=1e-5, atol=1e-6)
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], err_msg=f"{split} {name}")
  assert len(set(users.values())) == len(users)


# The oracle: one value after the other, with dicts and Python's own integers and floats.


def oracle_mix(x):
  mask = 2**64 - 1
  x = (x + 0x9E3779B97F4A7C15) & mask
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
  return x ^ (x >> 31)


def oracle_hash(text, seed=0):
  data = text.encode()
  h = oracle_mix((seed % 2**64) ^ oracle_mix(len(data)))
  for i in range(0, len(data), 8):
    h = oracle_mix(h ^ struct.unpack("<Q", data[i : i + 8].ljust(8, b"\0"))[0])
  return h


def oracle_vocabulary(values, min_count):
  counts = collections.Counter(values)
  kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
  return {v: i + 2 for i, v in enumerate(kept)}


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
  ads = oracle_vocabulary(
    [r["ad"] for r in train if r["ad"]] + [a for r in train for a in past(r)], 3
  )
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
          "ids": [2 + oracle_hash(r["user"], 7) % 48, ads.get(r["ad"], 1) if r["ad"] else 0],
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


def write_parquet(path, rows):
  text = {n: [None if r[n] in ("", "NA") else r[n] for r in rows] for n in NAMES}
  number = lambda n, kind: pl.Series(n, text[n], dtype=pl.String).cast(kind)
  # As pandas writes whole numbers with gaps: floats. Users as numbers, labels as booleans.
  pl.DataFrame(
    [
      number("click", pl.Int8).cast(pl.Boolean),
      number("stars", pl.Int32),
      number("price", pl.Float64),
      number("age", pl.Float64),
      number("user", pl.Float64),
      pl.Series("ad", text["ad"], dtype=pl.Categorical),
      pl.Series("past", [r["past"].split("|") if r["past"] else [] for r in rows]),
      number("when", pl.Int64),
      pl.Series("unused", text["unused"]),
    ]
  ).write_parquet(path, row_group_size=100)


def test_parquet_and_csv_are_read_alike(tmp_path):
  rows = make_rows()
  a = run(tmp_path, rows)
  equal(a, run(tmp_path, rows, name="data.parquet", write=write_parquet, out="parquet"))


@pytest.mark.parametrize("kind", [pl.String, pl.Int64, pl.Float64, pl.Categorical])
def test_missing_values_and_numbers_of_every_type(tmp_path, kind):
  numbers = pl.Series("y", ["0", "1"] * 5), pl.Series("d", ["-1", "7"] * 5)
  pl.DataFrame(numbers).cast(kind).write_parquet(tmp_path / "d.parquet")
  schema = 'missing_values = ["-1"]\n' + simple(by="order").replace("x]", "d]")
  (tmp_path / "s.toml").write_text(schema.replace("sparse", "dense"))
  args = ("table", tmp_path / "d.parquet", tmp_path / "out", tmp_path / "s.toml")
  data = prepare(*args, progress=False)
  assert [(f.name, f.mean) for f in data.features.dense] == [("d", 7), ("d.missing", 0)]
  assert columns(data, "train")["label"][:, 0].tolist() == [0, 1] * 4


def test_small_reads_change_nothing(tmp_path, monkeypatch):
  rows = make_rows(100)
  a = run(tmp_path, rows)
  monkeypatch.setattr(raw, "BLOCK_BYTES", 37)  # Less than a line.
  equal(a, run(tmp_path, rows, out="small"))
  monkeypatch.setattr(raw, "BATCH_ROWS", 13)
  equal(a, run(tmp_path, rows, name="data.parquet", write=write_parquet, out="parquet"))


def write_crlf(path, rows):
  write_csv(path, rows, end="\r\n")


def write_bom(path, rows):
  write_csv(path, rows)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def write_quoted(path, rows):
  quoted = [r | {"ad": f'"{r["ad"]}"' if r["ad"] else "", "unused": '"a, ""b"""'} for r in rows]
  write_csv(path, quoted)


def write_unended(path, rows):
  write_csv(path, rows)
  path.write_bytes(path.read_bytes().rstrip(b"\n"))


def write_gzip(path, rows):
  write_csv(path, rows)
  path.write_bytes(gzip.compress(path.read_bytes()))


def write_tsv(path, rows):
  path.write_text("\n".join("\t".join(r[n] for n in NAMES) for r in [{n: n for n in NAMES}, *rows]))


@pytest.mark.parametrize(
  "name, write",
  [
    ("crlf.csv", write_crlf),
    ("bom.csv", write_bom),
    ("quoted.csv", write_quoted),
    ("unended.csv", write_unended),
    ("data.csv.gz", write_gzip),
    ("data.tsv", write_tsv),
  ],
)
def test_dialects_are_read_alike(tmp_path, name, write):
  rows = make_rows(200)
  a = run(tmp_path, rows, name="plain.csv")
  equal(a, run(tmp_path, rows, name=name, write=write, out="other"))


@pytest.mark.parametrize("delimiter", [";", "::"])
@pytest.mark.parametrize("header", [True, False])
def test_another_delimiter_with_and_without_header(tmp_path, delimiter, header):
  rows = make_rows(200)
  a = run(tmp_path, rows)

  def write(path, rows):
    rows = [dict(zip(NAMES, NAMES)), *rows] if header else rows
    path.write_text("".join(delimiter.join(r[n] for n in NAMES) + "\n" for r in rows))

  names = [] if header else NAMES
  schema = f'delimiter = "{delimiter}"\nnames = {json.dumps(names)}\n' + SCHEMA
  equal(a, run(tmp_path, rows, schema, name="bare.txt", write=write, out="other"))


def simple(**split):
  lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in split.items())
  return f'[split]\n{lines}\n[columns.y]\nkind = "label"\n[columns.x]\nkind = "sparse"\n'


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
        u = oracle_mix(i) / 2**64
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


@given(st.lists(st.text(max_size=40), max_size=30), st.integers(-(2**70), 2**70))
@settings(max_examples=40, deadline=None)
def test_hash_equals_its_formula(texts, seed):
  found = hash_texts(pl.Series(texts, dtype=pl.String), seed)
  assert found.tolist() == [oracle_hash(t, seed) for t in texts]


def test_hash_of_a_slice_and_of_chunks_and_forever():
  texts = pl.Series(["", "a", "12345678", "123456789", "naïve", "x" * 1000])
  assert hash_texts(texts[2:5]).tolist() == hash_texts(texts).tolist()[2:5]
  halves = pl.concat([texts[:3], texts[3:]], rechunk=False)
  assert hash_texts(halves).tolist() == hash_texts(texts).tolist()
  # Written down once: rows of trained tables must stay what they were.
  assert hash_texts(pl.Series(["ad"])).tolist() == [17145965081915776285]
  assert hash_texts(pl.Series(["ad"]), 7).tolist() == [16352009611689214349]


@given(st.sets(st.text(max_size=12), max_size=200), st.lists(st.text(max_size=12), max_size=50))
@settings(max_examples=40, deadline=None)
def test_vocabulary_equals_a_dict(values, others):
  values = sorted(values)
  oracle = {v: i + 2 for i, v in enumerate(values)}
  asked = others + values
  rows = Vocabulary(values).rows(pl.Series(asked, dtype=pl.String))
  assert rows.tolist() == [oracle.get(v, 1) for v in asked]


def test_counter_merges_what_it_streams(monkeypatch):
  rng = random.Random(1)
  stream = [[str(rng.randint(0, 50)) for _ in range(100)] for _ in range(20)]
  counter = Counter()
  for values in stream:
    counter.add(pl.Series(values))
    counter._merge()
  expected = oracle_vocabulary([v for values in stream for v in values], 30)
  assert counter.values(min_count=30, limit=0) == list(expected)
