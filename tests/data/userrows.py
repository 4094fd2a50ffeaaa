"""Rows as a user has them, with their schema, and the preparation of them."""

import dataclasses
import json
import random

import numpy as np
from oracle import columns

from gemjax.data.preparation import prepare

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


def simple(**split):
  lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in split.items())
  return f'[split]\n{lines}\n[columns.y]\nkind = "label"\n[columns.x]\nkind = "sparse"\n'
