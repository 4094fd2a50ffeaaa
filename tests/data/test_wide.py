"""A table of 5 billion rows: ids beyond 32 bits, from the text to the words of a batch."""

import random

import numpy as np
import pytest
from oracle import columns, hash_text, vocabulary

from gemjax.data.block_reader import BlockReader
from gemjax.data.blocks import CorruptBlockError
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.preparation import prepare
from gemjax.data.prepared import PreparedWriter
from gemjax.data.schema_file import load_schema
from gemjax.features import FeatureSet, Sequence, Sparse

ROWS = 5_000_000_000
SCHEMA = """
[split]
by = "order"
[columns.y]
kind = "label"
[columns.query]
kind = "sparse"
encoding = "hash"
rows = 5_000_000_000
seed = 3
[columns.ad]
kind = "sparse"
[columns.past]
kind = "sequence"
separator = "|"
max_length = 6
encoding = "hash"
rows = 5_000_000_000
seed = 3
table = "query"
"""


def prepared(tmp_path, schema=SCHEMA, n=400):
  """The prepared set, and for each example the rows of query and ad and those of its past."""
  rng = random.Random(0)
  word = lambda: f"query {rng.randint(0, 999)}"
  users = [("" if i % 7 == 3 else word(), f"ad{rng.randint(0, 9)}") for i in range(n)]
  pasts = [[word() for _ in range(rng.randint(0, 6))] for _ in range(n)]
  lines = [f"{i % 2},{q},{a},{'|'.join(p)}\n" for i, ((q, a), p) in enumerate(zip(users, pasts))]
  (tmp_path / "in.csv").write_text("y,query,ad,past\n" + "".join(lines))
  (tmp_path / "s.toml").write_text(schema)
  rows = load_schema(tmp_path / "s.toml").columns["query"].rows
  data = prepare(
    "table", tmp_path / "in.csv", tmp_path / "out", tmp_path / "s.toml", progress=False
  )
  ads = vocabulary(a for _, a in users[: n * 8 // 10])
  row = lambda text: 2 + hash_text(text, 3) % (rows - 2) if text else 0
  ids = [[row(q), ads.get(a, 1)] for q, a in users]
  return data, ids, [[row(x) for x in p] for p in pasts]


def rebuilt(words):
  """Python's integers of words that come low word first."""
  assert words.dtype == np.uint32 and words.shape[-1] == 2
  pairs = words.reshape(-1, 2).tolist()
  return [low + (high << 32) for low, high in pairs]


def test_ids_from_the_text_to_the_batch(tmp_path):
  data, ids, pasts = prepared(tmp_path)
  assert data.features.wide and data.features.tables == {"query": ROWS, "ad": 12}
  assert 20 < sum(row[0] > 2**32 for row in ids) < 200, "the case needs ids beyond 32 bits"
  found = columns(data, "train")
  assert found["ids"].dtype == found["past.values"].dtype == np.int64
  assert found["ids"].tolist() == ids[:320]
  assert found["past.values"].tolist() == [x for p in pasts[:320] for x in p]
  for t, batch in enumerate(evaluation_batches(data, "train", batch_size=128, shards=2)):
    numbers = range(320 * t // 3, 320 * (t + 1) // 3)
    assert batch.ids_BS.shape == (128, 2, 2)
    flat = [x for i in numbers for x in ids[i]]
    assert rebuilt(batch.ids_BS) == flat + [0] * (256 - len(flat))
    values_NE = batch.sequences["past"].values_E.reshape(2, -1, 2)
    for s, values in enumerate(values_NE):
      of = [x for i in numbers if (i - numbers[0]) // 64 == s for x in pasts[i]]
      assert rebuilt(values) == of + [0] * (len(values) - len(of))
    assert batch.sequences["past"].lengths_B.dtype == np.int32


def test_the_shuffled_stream_keeps_them_too(tmp_path):
  data, ids, _ = prepared(tmp_path)
  batches = iter(train_batches(data, batch_size=64, seed=0))
  seen = [rebuilt(next(batches).ids_BS) for _ in range(5)]
  batches.close()
  pairs = [tuple(x[i : i + 2]) for x in seen for i in range(0, 128, 2)]
  assert sorted(pairs) == sorted(map(tuple, ids[:320]))


def test_without_a_feature_or_a_single_value(tmp_path):
  features = FeatureSet(sequence=(Sequence(name="s", size=ROWS, table="s", max_length=2),))
  part = {"label": np.zeros((4, 1), np.uint8), "s.lengths": np.zeros(4, np.int32)}
  data = written(tmp_path, part | {"s.values": np.zeros(0, np.int64)}, features)
  (batch,) = evaluation_batches(data, "train", batch_size=4)
  assert batch.ids_BS.shape == (4, 0, 2) and batch.sequences["s"].values_E.shape == (64, 2)


@pytest.mark.parametrize("rows", [2**31, 2**31 + 1, 2**40])
def test_int32_as_long_as_it_holds_every_row(tmp_path, rows):
  data, ids, pasts = prepared(tmp_path, SCHEMA.replace("5_000_000_000", str(rows)))
  found = columns(data, "train")
  assert found["ids"].dtype == found["past.values"].dtype == ("i8" if rows > 2**31 else "i4")
  assert found["ids"].tolist() == ids[:320]
  assert found["past.values"].tolist() == [x for p in pasts[:320] for x in p]
  (batch, *_) = evaluation_batches(data, "train", batch_size=320)
  if rows == 2**31:
    assert batch.ids_BS.dtype == np.int32 and batch.ids_BS.tolist() == ids[:320]
  else:
    assert rebuilt(batch.ids_BS) == [x for row in ids[:320] for x in row]


FEATURES = FeatureSet(
  sparse=(Sparse(name="big", size=ROWS, table="big"), Sparse(name="seven", size=7, table="seven")),
  sequence=(Sequence(name="past", size=ROWS, table="big", max_length=2),),
)


def good():
  return {
    "ids": np.array([[ROWS - 1, 6], [0, 0], [2**32, 3]]),
    "label": np.zeros((3, 1), np.uint8),
    "past.values": np.array([ROWS - 1, 2**32 + 5, 0]),
    "past.lengths": np.array([2, 0, 1], np.int32),
  }


def written(tmp_path, part, features=FEATURES):
  with PreparedWriter(tmp_path / "p") as writer:
    writer.add("train", part)
    return writer.finish(features, origin={})


def test_the_last_row_of_a_table_is_within_it(tmp_path):
  block = BlockReader(written(tmp_path, good()), "train").read(0)
  for name, column in good().items():
    np.testing.assert_array_equal(block[name], column)


@pytest.mark.parametrize(
  ("name", "place", "value", "words"),
  [
    ("ids", (1, 0), ROWS, ["'big'", f"id {ROWS}", f"{ROWS} rows"]),
    ("ids", (1, 0), -1, ["'big'", "id -1"]),
    ("ids", (1, 0), -(2**63), ["'big'", f"id -{2**63}"]),
    ("ids", (1, 0), 2**63 - 1, ["'big'", f"id {2**63 - 1}"]),
    ("ids", (1, 1), 7, ["'seven'", "id 7", "7 rows (0 to 6)"]),
    # Cut to 32 bits, these would be rows of their tables.
    ("ids", (1, 1), 2**32, ["'seven'", f"id {2**32}"]),
    ("ids", (1, 1), -(2**32) + 1, ["'seven'", f"id -{2**32 - 1}"]),
    ("past.values", 1, ROWS, ["'past'", f"id {ROWS}"]),
    ("past.values", 1, -1, ["'past'", "id -1"]),
    ("past.values", 1, 2**33 + 1, ["'past'", f"id {2**33 + 1}"]),
  ],
)
def test_ids_outside_their_table_are_refused(tmp_path, name, place, value, words):
  part = good()
  part[name][place] = value
  with pytest.raises(CorruptBlockError) as error:
    list(evaluation_batches(written(tmp_path, part), "train", batch_size=3))
  for word in ["train-00000.array_record block 0", "prepare again", *words]:
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["ids", "past.values"])
def test_int32_is_refused_where_a_table_is_wide(tmp_path, name):
  part = good()
  part[name] = part[name].astype(np.int32)
  with pytest.raises(CorruptBlockError, match=rf"'{name.split('.')[0]}'.*int32.*int64"):
    BlockReader(written(tmp_path, part), "train").read(0)
