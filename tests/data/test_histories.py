"""Histories on disk and in a batch: whole or refused, and never a look into the future."""

import dataclasses

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from numbered import (
  BLOCK,
  FEATURES,
  OFFSETS,
  USERS,
  N,
  assert_equal,
  assert_examples,
  columns,
  drain,
  events,
  past,
  stream,
  write,
)

from gemjax.data.blocks import CorruptBlockError, encode_block
from gemjax.data.histories import CorruptHistoryError, by_user, locate, write_history
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import open_prepared, take
from gemjax.features import event_capacity

HISTORY = FEATURES.history[0]


@pytest.mark.parametrize("length", [1, 7, 50, 1000])
def test_the_last_events_before_an_example(data, length):
  for batch in stream(data, 12, history_length=length):
    assert_examples(batch, batch.ids_BS[:, 0].tolist(), min(length, 50))
    ages = batch.histories["past"].age_E
    assert (ages[: batch.histories["past"].lengths_B.sum()] >= 1).all()
  (batch,) = evaluation_batches(data, "train", batch_size=N, history_length=length)
  assert_examples(batch, list(range(N)), min(length, 50))


def test_the_case_has_ties_long_pasts_and_users_without_any(data):
  of = [past(i, N) for i in range(N)]
  assert (
    sum(any(t == e for _, _, e in events(i // 10)) for i, t in enumerate(columns()["time"])) > 99
  )
  assert max(map(len, of)) > 100 and sum(not p for p in of) > 50
  assert any(not events(u) for u in range(USERS))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_each_shard_has_its_own_slots(data, shards):
  for batch in stream(data, 9, batch_size=96, shards=shards):
    ids_EC, age_E, _ = batch.histories["past"]
    room = len(age_E) // shards
    per = 96 // shards
    for s in range(shards):
      of = [e for i in batch.ids_BS[s * per : (s + 1) * per, 0] for e in past(int(i))]
      slots = np.column_stack([ids_EC, age_E])[s * room : (s + 1) * room]
      assert [tuple(x) for x in slots[: len(of)].tolist()] == of
      assert not slots[len(of) :].any()


def test_rooms_have_a_margin_beyond_what_was_measured(data):
  """All batches of the first three windows, here all of an epoch; none can have 100 * 50 events."""
  options = {"cost": lambda lengths: 1 + lengths["past"]}
  batches = stream(data, 10, batch_size=100, window_blocks=6, **options)
  most = max(b.histories["past"].lengths_B.sum() for b in batches)
  room = event_capacity(int(most * 1.03))
  assert max(len(b.histories["past"].age_E) for b in batches) == room
  (batch,) = evaluation_batches(data, "train", batch_size=N, history_length=1, **options)
  assert len(batch.histories["past"].age_E) <= event_capacity(N)


def test_slots_are_few_and_do_not_change_with_the_place_of_resumption(data):
  options = {"batch_size": 100, "seed": 1, "cost": lambda lengths: 1 + lengths["past"]}
  whole = stream(data, 30, **options)
  assert len({b.histories["past"].age_E.shape for b in whole}) <= 2
  for name in ("g", "h"):
    assert len({b.sequences[name].values_E.shape for b in whole}) <= 2
  late = iter(train_batches(data, **options))
  state = late.get_state()
  assert state["next_index"] == 0
  late.set_state(state | {"next_index": 25})
  assert_equal(next(late), whole[25])
  late.close()


def test_ages_beyond_int32_are_cut(tmp_path):
  part = columns([9])
  part["time"] = part["time"] + 2**40
  part["past.stop"] = part["past.start"] + 3
  (batch,) = evaluation_batches(write(tmp_path / "p", [part]), "train", batch_size=1)
  assert batch.histories["past"].age_E[:4].tolist() == [2**31 - 1] * 3 + [0]


def test_a_negative_length(data):
  with pytest.raises(ValueError, match=r"history_length must be 0 .all. or more, got -1"):
    train_batches(data, batch_size=10, seed=0, history_length=-1)


FILES = ["past.item.npy", "past.kind.npy", "past.time.npy", "past.offsets.npy"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda path: path.unlink(), "is missing, but the manifest names it"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated or corrupt, it has"),
    (lambda path: path.write_bytes(b""), "truncated or corrupt, it has 0 bytes"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated or corrupt, it has"),
    (lambda path: flip(path, 0), "checksum mismatch"),
    (lambda path: flip(path, -1), "checksum mismatch"),
  ],
)
def test_a_file_that_is_not_what_was_written(tmp_path, file, change, words):
  path = write(tmp_path / "p", [columns(range(20))]).path
  change(path / file)
  with pytest.raises(CorruptHistoryError, match=words) as error:
    open_prepared(path)
  assert str(path / file) in str(error.value) and "prepare again" in str(error.value)


def flip(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(bytes(content))


def test_other_events_are_other_data(tmp_path):
  one = write(tmp_path / "1", [columns()])
  features = dataclasses.replace(FEATURES, history=())
  none = write(tmp_path / "2", [columns()], features)
  assert one.split("train").digest != none.split("train").digest


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    ("past.start", -1, ["events -1 to", "not within"]),
    ("past.stop", OFFSETS[-1] + 1, [f"{OFFSETS[-1] + 1} are not within the {OFFSETS[-1]} stored"]),
    ("past.stop", OFFSETS[7] - 1, [f"events {OFFSETS[7]} to {OFFSETS[7] - 1} are not within"]),
    ("past.start", OFFSETS[7] + 1, ["do not begin with the first of a user"]),
    ("past.start", OFFSETS[6], ["reach into another's"]),
    ("past.stop", OFFSETS[8] + 1, ["reach into another's"]),
    ("past.stop", OFFSETS[8], ["which is not before the example at"]),
    ("time", events(7)[len(past(74, N)) - 1][2], ["which is not before"]),
    ("time", columns([74])["time"][0] - 11, ["which is not before the example at"]),
  ],
)
def test_an_example_that_would_see_what_it_must_not(tmp_path, name, value, words):
  """Written by another program, with a good checksum: refused, naming block and example."""
  data = write(tmp_path / "p", [columns()])
  whole = columns()
  whole[name][74] = value
  writer = ArrayRecordWriter(str(data.path / data.splits["train"].files[0]), "group_size:1")
  for b in range(16):
    writer.write(encode_block(take(whole, slice(b * BLOCK, (b + 1) * BLOCK))))
  writer.close()
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  for word in ["train-00000.array_record block 1", "history 'past', example 10", *words]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda c: {k: v for k, v in c.items() if k != "time"}, "'time' is absent"),
    (lambda c: {k: v for k, v in c.items() if k != "past.stop"}, "'past.stop' is absent"),
    (lambda c: c | {"past.start": c["past.start"].astype(np.int32)}, "'past.start' is .*int32"),
  ],
)
def test_a_block_without_its_past(tmp_path, change, words):
  data = write(tmp_path / "p", [change(columns())])
  with pytest.raises(CorruptBlockError, match=rf"block 0, history 'past': column {words}"):
    drain(data)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"ids": {"item": [0, 60, 1, 2], "kind": [0] * 4}}, "'item': ids 0 to 60 .* table of 60 rows"),
    ({"ids": {"item": [0, -1, 1, 2], "kind": [0] * 4}}, "'item': ids -1 to 2"),
    ({"ids": {"item": [0, 1, 1, 2]}}, "columns of {'item': 4} events for 4 times"),
    ({"ids": {"item": [0] * 3, "kind": [0] * 4}}, "'item': 3"),
    ({"time_E": [1, 2, 2, 1]}, "not in order of time"),
    ({"offsets_U1": [0, 2, 3]}, "offsets must rise from 0 to 4"),
    ({"offsets_U1": [0, 3, 2, 4]}, "offsets must rise"),
    ({"history": dataclasses.replace(HISTORY, name="a/b")}, "'a/b' must be of letters"),
  ],
)
def test_what_is_no_history_is_not_written(tmp_path, change, words):
  good = {
    "history": HISTORY,
    "ids": {"item": [0, 1, 1, 2], "kind": [0] * 4},
    "time_E": [1, 2, 1, 2],
    "offsets_U1": [0, 2, 4],
  }
  arguments = good | change
  ids = {n: np.array(x, np.int32) for n, x in arguments["ids"].items()}
  rest = [np.array(arguments[n]) for n in ("time_E", "offsets_U1")]
  with pytest.raises(ValueError, match=words):
    write_history(tmp_path, arguments["history"], ids, *rest)


def test_order_and_place_against_lists():
  rng = np.random.default_rng(0)
  user, time = rng.integers(0, 30, 500), rng.integers(-40, 40, 500)
  user[user == 7] = 8  # One user without events, and below one number that nobody has.
  order, offsets = by_user(user, time, 31)
  expected = sorted(range(500), key=lambda e: (user[e], time[e], e))
  assert order.tolist() == expected
  who, when = rng.integers(-1, 31, 800), rng.integers(-50, 50, 800)
  start, stop = locate(offsets, time[order], who, when)
  for b in range(800):
    seen = [e for e in expected if user[e] == who[b] and time[e] < when[b]]
    assert order[start[b] : stop[b]].tolist() == seen
