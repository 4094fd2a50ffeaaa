"""MovieLens in every layout it comes in, made up and, where it is, real."""

import bisect
import collections
import csv
import random

import numpy as np
import pytest
from oracle import PICKED, columns, real, row, vocabulary

from gemjax.data.preparation import prepare, recognise
from gemjax.data.prepared import take


def check_movielens(data, events, users, items, picked):
  """`events` are (user, item, rating, time) in file order, a rating of 0 being unknown."""
  past = collections.defaultdict(list)
  for number, (user, item, rating, time) in enumerate(events):
    past[user].append((time, number, (item, rating, items[item]["genres"][0])))
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
          "before": before,
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
  # Of events, those before the last example of the train split are counted, once each.
  end = max(e["time"] for e in train)
  early = [(item, rating) for _, item, rating, time in events if time < end]
  tables[1] = vocabulary([e["ids"][1] for e in train] + [item for item, _ in early])
  ratings = vocabulary(f"{rating:.0f}" if rating else "" for _, rating in early)
  firsts = [items[item]["genres"][0] for item, _ in early]
  genres = vocabulary([g for e in train for g in e["genres"]] + firsts)
  names = ("user", "item", "age", "gender", "occupation", "zip", "year")
  assert tuple(f.name for f in data.features.sparse) == names
  sizes = {n: len(t) + 2 for n, t in zip(names, tables)}
  sizes |= {"genre": len(genres) + 2, "rating": len(ratings) + 2}
  assert data.features.tables == sizes
  assert data.histories["rated"].events == len(events)
  parts = ("item", "rating", "genre", "time")
  stored = {n: np.load(data.path / f"rated.{n}.npy", mmap_mode="r") for n in parts}
  for split, expected in splits.items():
    found = columns(data, split)
    np.testing.assert_array_equal(found["label"][:, 0], [e["label"] for e in expected])
    lengths = found["rated.stop"] - found["rated.start"]
    np.testing.assert_array_equal(lengths, [e["before"] for e in expected], split)
    np.testing.assert_array_equal(found["time"], [e["time"] for e in expected])
    for b in picked if picked is not None else range(len(expected)):
      e = expected[b % len(expected)]
      one = take(found, slice(b % len(expected), b % len(expected) + 1))
      assert one["ids"][0].tolist() == [row(t, v) for t, v in zip(tables, e["ids"])]
      seen = slice(one["rated.start"][0], one["rated.stop"][0])
      times, before = past[e["ids"][0]]
      assert stored["time"][seen].tolist() == list(times[: e["before"]])
      item, rating, genre = zip(*before[: e["before"]]) if e["before"] else ((), (), ())
      rating = [f"{x:.0f}" if x else "" for x in rating]
      assert stored["item"][seen].tolist() == [row(tables[1], x) for x in item]
      assert stored["rating"][seen].tolist() == [row(ratings, x) for x in rating]
      assert stored["genre"][seen].tolist() == [row(genres, x) for x in genre]
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
