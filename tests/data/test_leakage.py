"""No example sees its future or another user: batches against joins by brute force."""

import collections
import json
import random

import numpy as np
import pytest
from oracle import hash_text, real, vocabulary

from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.preparation import prepare

SCHEMA = """
user = "user"
time = "when"
[split]
by = "time"
[columns.click]
kind = "label"
[columns.ad]
kind = "sparse"
[columns.number]
kind = "sparse"
encoding = "hash"
rows = 100_000
[histories.clicks]
file = "clicks.csv"
user = "who"
max_length = 6
[histories.clicks.columns.ad]
table = "ad"
[histories.clicks.columns.surface]
encoding = "hash"
rows = 40
seed = 5
[histories.views]
file = "views"
time = "at"
[histories.views.columns.ad]
table = "ad"
"""
EXAMPLES = 300


def written(folder, seed=0, change=lambda name, e: e):
  """A table with two histories, one a folder of files; times are fractions, with ties."""
  rng = random.Random(seed)
  when = lambda: rng.randint(0, 400) / 4
  rows = [
    [rng.randint(0, 1), f"ad{rng.randint(0, 30)}", i, f"u{rng.randint(0, 12)}", when()]
    for i in range(EXAMPLES)
  ]
  # Users 10 to 12 have examples and no events, users 13 to 15 events and no example.
  who = lambda: f"u{rng.choice([*range(10), 13, 14, 15])}"
  surface = lambda: rng.choice(["feed", "reels", ""])
  clicks = [[f"ad{rng.randint(0, 40)}", who(), when(), surface()] for _ in range(400)]
  views = [[f"ad{rng.randint(0, 40)}", who(), when()] for _ in range(900)]
  clicks = [change("clicks", e) for e in clicks]
  views = [change("views", e) for e in views]
  folder.mkdir()
  (folder / "views").mkdir()
  save(folder / "log.csv", "click,ad,number,user,when", rows)
  save(folder / "clicks.csv", "ad,who,when,surface", clicks)
  save(folder / "views" / "1.csv", "ad,user,at", views[:500])
  save(folder / "views" / "2.csv", "ad,user,at", views[500:])
  (folder / "schema.toml").write_text(SCHEMA)
  data = prepare(
    "table", folder / "log.csv", folder / "out", folder / "schema.toml", progress=False
  )
  return data, rows, clicks, views


def save(path, header, rows):
  path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def joined(batch, name):
  """The events of each example of a batch of one shard: (ids, age) each."""
  ids_EC, age_E, lengths_B = batch.histories[name]
  ends = np.cumsum(lengths_B)
  return [
    [(*ids, age) for ids, age in zip(ids_EC[e - n : e].tolist(), age_E[e - n : e].tolist())]
    for e, n in zip(ends, lengths_B)
  ]


def test_a_table_against_a_join_of_lists(tmp_path):
  data, rows, clicks, views = written(tmp_path / "t")
  times = sorted(row[4] for row in rows)
  train = [row for row in rows if row[4] < times[round(0.8 * EXAMPLES)]]
  end = int(max(row[4] for row in train))
  early = [e[0] for e in clicks + views if int(e[2]) < end]
  ads = vocabulary([row[1] for row in train] + early)
  assert data.features.tables["ad"] == len(ads) + 2
  surface = lambda text: 2 + hash_text(text, 5) % 38 if text else 0
  number = {2 + hash_text(str(row[2])) % 99_998: row for row in rows}
  assert len(number) == EXAMPLES
  seen = collections.Counter()
  for split in ("train", "valid", "test"):
    for batch in evaluation_batches(data, split, batch_size=50):
      for b, (c, v) in enumerate(zip(joined(batch, "clicks"), joined(batch, "views"))):
        if not batch.weight_B[b]:
          assert c == v == []
          continue
        _, _, _, user, time = number[int(batch.ids_BS[b, 1])]
        mine = lambda of, user=user, time=int(time): [
          (*e, time - int(e[2]))
          for e in sorted(of, key=lambda e: int(e[2]))
          if e[1] == user and int(e[2]) < time
        ]
        row = lambda ad: ads.get(ad, 1)
        assert c == [(row(e[0]), surface(e[3]), e[-1]) for e in mine(clicks)[-6:]]
        assert v == [(row(e[0]), e[-1]) for e in mine(views)]
        seen[min(len(c), 6)] += 1
  assert sum(seen.values()) == EXAMPLES and min(seen[0], seen[6]) > 30


def test_an_event_at_or_after_an_example_changes_no_bit_of_it(tmp_path):
  """Other events from second 85 on, behind the train split, whose vocabularies are the same."""
  cut = 85

  def other(name, e):
    return [f"ad{hash_text(e[0]) % 41}", *e[1:]] if e[2] >= cut else e

  one, rows, clicks, views = written(tmp_path / "1")
  two = written(tmp_path / "2", change=other)[0]
  assert sum(other("", e) != e for e in clicks + views) > 100
  time = {2 + hash_text(str(row[2])) % 99_998: row[4] for row in rows}
  same = unequal = 0
  for split in ("train", "valid", "test"):
    batches = (evaluation_batches(data, split, batch_size=1) for data in (one, two))
    for a, b in zip(*batches, strict=True):
      pairs = [(a.ids_BS, b.ids_BS)]
      pairs += [pair for n in a.histories for pair in zip(a.histories[n], b.histories[n])]
      equal = all(x.tobytes() == y.tobytes() for x, y in pairs)
      if time[int(a.ids_BS[0, 1])] < cut + 1:  # Whole seconds decide.
        assert equal
        same += 1
      unequal += not equal
  assert same > 200 and unequal > 10


@pytest.mark.parametrize("balanced", [False, True])
def test_movielens_100k_against_a_brute_force_join(ml100k, balanced):
  """Every event is one of its user's, strictly before; none of the last 60 is left out."""
  data, events = ml100k
  words = json.loads((data.path / "vocabularies.json").read_text())
  row = {text: number for number, text in enumerate(words["item"], 2)}
  rating = {text: number for number, text in enumerate(words["rating"], 2)}
  of = collections.defaultdict(list)
  for user, item, stars, when in events:
    of[user].append((when, item, stars))
  cost = (lambda lengths: lengths["rated"] ** 2.0) if balanced else None
  options = {"batch_size": 512, "seed": 3, "shards": 4, "cost": cost, "history_length": 60}
  stream, lengths = iter(train_batches(data, **options)), []
  for _ in range(3):
    batch = next(stream)
    ids_EC, age_E, lengths_B = batch.histories["rated"]
    ids_NE, age_NE = ids_EC.reshape(4, -1, 3), age_E.reshape(4, -1)
    end_NB = np.cumsum(lengths_B.reshape(4, -1), 1).reshape(-1)
    for b in range(512):
      user, item = (words[n][batch.ids_BS[b, s] - 2] for s, n in enumerate(("user", "item")))
      (time,) = (when for when, other, _ in of[user] if other == item)
      past = sorted((e for e in of[user] if e[0] < time), key=lambda e: e[0])[-60:]
      found = slice(end_NB[b] - lengths_B[b], end_NB[b])
      assert age_NE[b // 128, found].tolist() == [time - when for when, _, _ in past]
      ids = ids_NE[b // 128, found, :2].tolist()
      assert ids == [[row[other], rating[stars]] for _, other, stars in past]
      lengths.append(len(past))
  stream.close()
  assert min(lengths) == 0 and lengths.count(60) > 300


@pytest.fixture(scope="module")
def ml100k(tmp_path_factory):
  raw = real("ml-100k")
  lines = (raw / "ml-100k.inter").read_text().splitlines()[1:]
  events = [line.split("\t") for line in lines]
  events = [(u, i, f"{float(r):.0f}", int(float(t))) for u, i, r, t in events]
  data = prepare("movielens-100k", raw, tmp_path_factory.mktemp("ml") / "out", progress=False)
  return data, events
