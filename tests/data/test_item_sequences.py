"""Sequences of next items: nothing of the future, nothing lost, one shape."""

import numpy as np
import pytest

from gemjax.data.next_item import Events, Sequences, read_events
from gemjax.data.raw import RawDataError

USERS, LENGTH = 61, 7


@pytest.fixture
def events():
  """Event e has the item e, so that an item tells its user and its place."""
  rng = np.random.default_rng(0)
  count_U = rng.integers(1, 30, USERS)
  count_U[:3] = 1, 2, 3
  total = int(count_U.sum())
  time_N = np.concatenate([np.sort(rng.integers(0, 10**9, n)) for n in count_U])
  return Events(np.arange(total, dtype=np.int32), time_N, np.append(0, count_U.cumsum()), total)


def unpacked(batch):
  """Lists of items, next items and ages of every user with a sequence."""
  parts = [
    [x[a:b].tolist() for x in (batch.item_E, batch.next_E, batch.age_E)]
    for a, b in zip(batch.offsets_B1[:-1], batch.offsets_B1[1:])
  ]
  return [part for part in parts if part[0]]


@pytest.mark.parametrize("held_out", [0, 1, 2])
def test_an_epoch_is_every_users_newest_items_before_the_held_out_ones(events, held_out):
  sequences = Sequences(events, LENGTH, held_out, batch_size=8)
  want = {}
  for a, b in zip(events.offsets_U1[:-1], events.offsets_U1[1:]):
    known = list(range(a, b))[: b - a - held_out]
    if len(known) > 1:
      ages = [int(events.time_N[known[-2]] - events.time_N[e]) + 1 for e in known[:-1]]
      want[known[-1]] = [known[:-1][-LENGTH:], known[1:][-LENGTH:], ages[-LENGTH:]]
  found = {}
  batches = list(sequences.epoch(np.random.default_rng(1)))
  for batch in batches:
    for part in unpacked(batch):
      assert part[1][-1] not in found
      found[part[1][-1]] = part
  assert found == want
  assert len(batches) == sequences.batches
  assert len({tuple(x.shape for x in batch) for batch in batches}) == 1


def test_training_never_reads_the_item_that_the_test_asks_for(events):
  """Nor does validation, and its own training does not read its item either."""
  last = set((events.offsets_U1[1:] - 1).tolist())
  before = set((events.offsets_U1[1:] - 2).tolist())
  reads = lambda held_out: {
    int(item)
    for batch in Sequences(events, LENGTH, held_out, 8).epoch(np.random.default_rng(0))
    for item in np.concatenate([batch.item_E[batch.next_E >= 0], batch.next_E[batch.next_E >= 0]])
  }
  assert reads(1) & last == set()
  assert reads(2) & (last | before) == set()
  assert reads(0) & last  # The question itself: the check above can fail.


def test_held_out_events_change_no_batch(events):
  changed = Events(events.item_N.copy(), events.time_N.copy(), events.offsets_U1, events.items)
  last_U = events.offsets_U1[1:] - 1
  changed.item_N[last_U] = 0
  changed.time_N[last_U] += 10**6
  for a, b in zip(
    Sequences(events, LENGTH, 1, 8).epoch(np.random.default_rng(3)),
    Sequences(changed, LENGTH, 1, 8).epoch(np.random.default_rng(3)),
  ):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x, y)


def test_batches_hold_equally_many_events_and_are_dealt_anew():
  rng = np.random.default_rng(0)
  count_U = np.minimum(rng.zipf(1.5, 4000) + 1, 500)
  total = int(count_U.sum())
  events = Events(
    np.zeros(total, np.int32), np.zeros(total, np.int64), np.append(0, count_U.cumsum()), 1
  )
  sequences = Sequences(events, 200, 0, batch_size=128)
  epochs = [list(sequences.epoch(np.random.default_rng(e))) for e in range(2)]
  used = np.array([batch.offsets_B1[-1] for batch in epochs[0]])
  assert used.max() <= sequences.room
  assert used.sum() / (len(used) * sequences.room) > 0.85
  assert used.max() / used.mean() < 1.05
  assert any((a.offsets_B1 != b.offsets_B1).any() for a, b in zip(*epochs))


def test_reads_movielens_in_order_of_time(tmp_path):
  (tmp_path / "ratings.dat").write_text("7::30::5::20\n2::10::3::9\n7::10::4::10\n7::99::1::10\n")
  events = read_events(tmp_path)
  assert events.items == 3
  assert events.offsets_U1.tolist() == [0, 1, 4]
  assert events.item_N.tolist() == [0, 0, 2, 1]  # 10; 10 and 99 in file order, then 30.
  assert events.time_N.tolist() == [9, 10, 10, 20]


def test_a_folder_without_events_is_named(tmp_path):
  with pytest.raises(RawDataError, match=r"holds none of interactions_chronological.csv"):
    read_events(tmp_path)
  (tmp_path / "ratings.dat").write_text("7::30::5::20\n7::::5::20\n")
  with pytest.raises(RawDataError, match=r"line 2.*'item' is missing"):
    read_events(tmp_path)


def test_events_too_few_for_any_sequence_are_refused():
  few = Events(np.arange(4, dtype=np.int32), np.arange(4), np.array([0, 2, 4]), 4)
  assert Sequences(few, LENGTH, 0, batch_size=8).batches == 1
  with pytest.raises(RawDataError, match="no user has the 3 events that a sequence"):
    _ = Sequences(few, LENGTH, 1, batch_size=8).batches
