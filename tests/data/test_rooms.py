"""Rooms: few sizes, that hold what they must and waste no more than they say."""

import numpy as np
import pytest

from gemjax.data.rooms import RATIO, Rooms
from gemjax.features import HISTORY_STEPS, event_capacity


@pytest.mark.parametrize("most", [100, 1_000, 16_000, 3_000_017])
def test_no_batch_is_cut_and_few_slots_are_empty(most):
  """From a thousandth to three times of what was measured."""
  rooms, sizes = Rooms({"h": most}), set()
  for events in np.unique(np.geomspace(max(1, most / 1000), 3 * most, 5000).astype(int)).tolist():
    slots = rooms.of({"h": events})["h"]
    assert slots >= events
    assert slots % 64 == 0 and (slots == 64 or slots < events / RATIO + 64), (events, slots)
    sizes.add(slots)
  assert len(sizes) <= np.log(3000) / -np.log(float(RATIO)) + 3


def test_those_of_batches_that_differ_little_are_one():
  rooms, room = Rooms({"h": 10_300}), event_capacity(10_300, steps=HISTORY_STEPS)
  assert {rooms.of({"h": n})["h"] for n in range(int(0.86 * room), room + 1)} == {room}


def test_histories_shrink_and_grow_together():
  rooms = Rooms({"a": 10_000, "b": 500})
  events = range(0, 20_000, 50)
  of = lambda a, b: tuple(rooms.of({"a": a, "b": b}).values())
  sizes = {of(a, b) for a in events for b in (0, 90, 240, 499)}
  alone = {of(a, 0)[0] for a in events}
  assert {a for a, _ in sizes} == alone and len(sizes) == len(alone)
  assert rooms.of({"a": 10, "b": 500}) == rooms.of({"a": 10_000, "b": 500})
  assert rooms.of({"a": 10, "b": 513})["a"] > 10_240 == rooms.of({"a": 10, "b": 512})["a"]


def test_what_was_never_seen_has_the_least_room():
  rooms = Rooms({"h": 0})
  assert rooms.of({"h": 0}) == {"h": 64} and rooms.of({"h": 64}) == {"h": 64}
  assert 5_000 <= rooms.of({"h": 5_000})["h"] < 7_000
  assert Rooms({}).of({}) == {}
