"""The public sets: made-up files in every layout they come in, and the real ones where they are.

The oracle reads the files line by line and encodes a few examples with dicts and loops.
"""

import bisect
import collections
import csv
import gzip
import math
import os
import pathlib
import random

import numpy as np
import pytest

from gemjax.data.block_reader import BlockReader
from gemjax.data.preparation import prepare, recognise
from gemjax.data.prepared import concatenate, take

REAL = pathlib.Path(
  os.environ.get("GEMJAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data")
)


def real(name):
  path = REAL / name
  if not path.exists():
    pytest.skip(f"{path} is absent; set GEMJAX_DATA to the folder that holds {name}")
  return path


def columns(data, split):
  reader = BlockReader(data, split)
  return concatenate([reader.read(b) for b in range(len(reader.sizes))])


def vocabulary(values, min_count=1):
  counts = collections.Counter(v for v in values if v)
  kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
  return {v: i + 2 for i, v in enumerate(kept)}


def row(table, value):
  return table.get(value, 1) if value else 0


def check_movielens(data, events, users, items, picked):
  """`events` are (user, item, rating, time) in file order, a rating of 0 being unknown."""
  past = collections.defaultdict(list)
  for number, (user, item, _, time) in enumerate(events):
    past[user].append((time, number, item))
  for user in past:
    times, _, seen = zip(*sorted(past[user]))
    past[user] = times, seen
  examples = []
  for user, item, rating, time in events:
    if rating:
      u, i = users[user], items[item]
      before = bisect.bisect_left(past[user][0], time)
      examples.append(
        {
          "ids": [user, item, u["age"], u["gender"], u["occupation"], u["zip"][:3], i["year"]],
          "genres": i["genres"],
          "history": past[user][1][max(before - 50, 0) : before],
          "label": int(rating >= 4),
          "time": time,
        }
      )
  times = sorted(e["time"] for e in examples)
  cuts = times[round(0.8 * len(times))], times[round(0.9 * len(times))]
  splits = {"train": [], "valid": [], "test": []}
  for e in examples:
    splits["train" if e["time"] < cuts[0] else "valid" if e["time"] < cuts[1] else "test"].append(e)
  train = splits["train"]
  tables = [vocabulary(e["ids"][s] for e in train) for s in range(7)]
  tables[1] = vocabulary(x for e in train for x in [e["ids"][1], *e["history"]])
  genres = vocabulary(g for e in train for g in e["genres"])
  names = ("user", "item", "age", "gender", "occupation", "zip", "year")
  assert tuple(f.name for f in data.features.sparse) == names
  sizes = {n: len(t) + 2 for n, t in zip(names, tables)} | {"genres": len(genres) + 2}
  assert data.features.tables == sizes
  for split, expected in splits.items():
    found = columns(data, split)
    np.testing.assert_array_equal(found["label"][:, 0], [e["label"] for e in expected])
    np.testing.assert_array_equal(
      found["history.lengths"], [len(e["history"]) for e in expected], split
    )
    for b in picked if picked is not None else range(len(expected)):
      e = expected[b % len(expected)]
      one = take(found, slice(b % len(expected), b % len(expected) + 1))
      assert one["ids"][0].tolist() == [row(t, v) for t, v in zip(tables, e["ids"])]
      assert one["history.values"].tolist() == [row(tables[1], x) for x in e["history"]]
      assert one["genres.values"].tolist() == [row(genres, g) for g in e["genres"]]


GENRES = ["unknown", "Action", "Children's", "Film-Noir", "Sci-Fi"]


def made_up(seed=3, unrated=0.0):
  """A small MovieLens: 20 users, 40 movies, some without year or genre, times with ties."""
  rng = random.Random(seed)
  users = {
    str(u): {
      "age": str(rng.choice([1, 18, 25, 35])),
      "gender": rng.choice("MF"),
      "occupation": rng.choice(["writer", "other"]),
      "zip": f"{rng.randint(0, 99999):05d}",
    }
    for u in range(1, 21)
  }
  items = {
    str(i): {
      "year": str(rng.randint(1950, 1999)) if i % 9 else "",
      "genres": rng.sample(GENRES, rng.randint(1, 3)),
      "title": f"Müvie, the {i}th",
    }
    for i in range(1, 41)
  }
  for item in items.values():
    item["genres"].sort(key=GENRES.index)
  events = [
    (u, i, 0 if rng.random() < unrated else rng.randint(1, 5), rng.randint(0, 300))
    for u in users
    for i in rng.sample(list(items), 30)
  ]
  rng.shuffle(events)
  return events, users, items


def write_recbole(path, events, users, items):
  lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
  lines += ["\t".join(map(str, e)) for e in events]
  (path / "ml-100k.inter").write_text("\n".join(lines) + "\n")
  head = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
  lines = ["\t".join([u, *v.values()]) for u, v in users.items()]
  (path / "ml-100k.user").write_text("\n".join([head, *lines]) + "\n")
  head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
  lines = [f"{i}\t{v['title']}\t{v['year']}\t{' '.join(v['genres'])}" for i, v in items.items()]
  (path / "ml-100k.item").write_text("\n".join([head, *lines]) + "\n")


def write_100k(path, events, users, items):
  (path / "u.data").write_text("".join("\t".join(map(str, e)) + "\n" for e in events))
  (path / "u.user").write_text("".join("|".join([u, *v.values()]) + "\n" for u, v in users.items()))
  (path / "u.genre").write_text("".join(f"{g}|{n}\n" for n, g in enumerate(GENRES)) + "\n")
  lines = []
  for i, v in items.items():
    date = f"01-Jan-{v['year']}" if v["year"] else ""
    flags = [str(int(g in v["genres"])) for g in GENRES]
    lines.append("|".join([i, v["title"], date, "", "http://x", *flags]))
  (path / "u.item").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))


def _titles(items, between):
  for i, v in items.items():
    title = f"{v['title']} ({v['year']})" if v["year"] else v["title"]
    yield between.join([i, title, "|".join(v["genres"])]) + "\n"


def write_1m(path, events, users, items):
  (path / "ratings.dat").write_text("".join("::".join(map(str, e)) + "\n" for e in events))
  sides = ([u, v["gender"], v["age"], v["occupation"], v["zip"]] for u, v in users.items())
  (path / "users.dat").write_text("".join("::".join(s) + "\n" for s in sides))
  (path / "movies.dat").write_bytes("".join(_titles(items, "::")).encode("latin-1"))


def write_chronological(path, events, users, items):
  lines = ["user_id,item_id,position,rating,timestamp,timestamp_exact\n"]
  lines += [f"{u},{i},0,{rating},{time},1\n" for u, i, rating, time in events]
  (path / "interactions_chronological.csv").write_text("".join(lines))
  sides = ([u, v["gender"], v["age"], v["occupation"], v["zip"]] for u, v in users.items())
  (path / "users.tsv").write_text("".join("\t".join(s) + "\n" for s in sides))
  (path / "movies.tsv").write_text("".join(_titles(items, "\t")))


LAYOUTS = [
  ("movielens-100k", write_recbole, 0.0),
  ("movielens-100k", write_100k, 0.0),
  ("movielens-1m", write_1m, 0.0),
  ("movielens-1m", write_chronological, 0.7),
]


@pytest.mark.parametrize("dataset, write, unrated", LAYOUTS)
def test_movielens_made_up(tmp_path, monkeypatch, dataset, write, unrated):
  monkeypatch.setattr("gemjax.data.movielens.BATCH_ROWS", 100)
  made = made_up(unrated=unrated)
  raw = tmp_path / "raw"
  raw.mkdir()
  write(raw, *made)
  assert recognise(raw) == dataset
  data = prepare(dataset, raw, tmp_path / "out", progress=False)
  check_movielens(data, *made, picked=None)


def test_movielens_bad_rows(tmp_path):
  events, users, items = made_up()
  write_100k(tmp_path, [*events, ("7", "x9", 3, 5)], users, items)
  with pytest.raises(ValueError, match=r"u.data, line 601: column 'item' must be a number.*'x9'"):
    prepare("movielens-100k", tmp_path, tmp_path / "out", progress=False)
  write_100k(tmp_path, [*events, ("7", "3", "", 5)], users, items)
  with pytest.raises(ValueError, match=r"u.data, line 601: column 'label' is missing"):
    prepare("movielens-100k", tmp_path, tmp_path / "out", progress=False)
  write_100k(tmp_path, events, {"x1": users["1"], **users}, items)
  with pytest.raises(ValueError, match=r"u.user, line 1: column 'user' must be a number.*'x1'"):
    prepare("movielens-100k", tmp_path, tmp_path / "out", progress=False)
  write_100k(tmp_path, [(u, i, 0, t) for u, i, _, t in events], users, items)
  with pytest.raises(ValueError, match=r"u.data holds no known rating"):
    prepare("movielens-100k", tmp_path, tmp_path / "out", progress=False)
  assert not (tmp_path / "out").exists()


PICKED = [0, 1, 77, 1234, 9001]


def test_movielens_100k_real(tmp_path):
  raw = real("ml-100k")
  text = lambda kind: (raw / f"ml-100k.{kind}").read_text()
  read = lambda kind: [x.split("\t") for x in text(kind).splitlines()[1:]]
  events = [(u, i, float(r), float(t)) for u, i, r, t in read("inter")]
  users = {u: {"age": a, "gender": g, "occupation": o, "zip": z} for u, a, g, o, z in read("user")}
  items = {i: {"year": y, "genres": g.split(" ")} for i, _, y, g in read("item")}
  assert recognise(raw) == "movielens-100k"
  data = prepare("movielens-100k", raw, tmp_path / "out", progress=False)
  assert sum(s.examples for s in data.splits.values()) == 100_000
  check_movielens(data, events, users, items, PICKED)


def test_movielens_1m_real(tmp_path):
  raw = real("ml-1m")
  with open(raw / "interactions_chronological.csv") as file:
    events = [
      (x["user_id"], x["item_id"], int(x["rating"]), int(x["timestamp"]))
      for x in csv.DictReader(file)
    ]
  read = lambda name: [x.split("\t") for x in (raw / name).read_text().splitlines()]
  users = {
    u: {"age": a, "gender": g, "occupation": o, "zip": z} for u, g, a, o, z in read("users.tsv")
  }
  items = {i: {"year": t[-5:-1], "genres": g.split("|")} for i, t, g in read("movies.tsv")}
  assert recognise(raw) == "movielens-1m"
  data = prepare("movielens-1m", raw, tmp_path / "out", progress=False)
  assert sum(s.examples for s in data.splits.values()) == 100_000
  check_movielens(data, events, users, items, PICKED)


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
