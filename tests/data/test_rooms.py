"""Rooms: few sizes, that hold what they must and waste no more than they say."""

import itertools

import numpy as np
import pytest

from gemjax.data.rooms import RATIO, Rooms
from gemjax.features import event_capacity as capacity

MARGIN = 0.03


def rooms(events, limit=10**9):
  """Measured on batches of one history with so many events."""
  return Rooms.measured([{"h": n} for n in events], {"h": limit}, MARGIN)


def slots(of, events):
  return of.of({"h": events})["h"]


@pytest.mark.parametrize("most", [70, 200, 1_000, 16_000, 3_000_017])
def test_no_batch_is_cut_and_few_slots_are_empty_whatever_was_measured(most):
  """From a fiftieth to three times of that."""
  of, largest, sizes = rooms([most]), capacity(int(most * (1 + MARGIN))), set()
  for events in np.unique(np.geomspace(most / 50, 3 * most, 3000).astype(int)).tolist():
    room = slots(of, events)
    assert room >= events and (room in (64, largest) or room < events / RATIO + 8)
    sizes.add(room)
  assert len(sizes) <= np.log(3 * most / max(most / 50, 64)) / -np.log(float(RATIO)) + 3


def test_batches_that_differ_little_have_one_size():
  of = rooms(range(10_200, 11_000))
  assert {slots(of, n) for n in range(10_200, 11_329, 7)} == {capacity(int(10_999 * 1.03))}


def test_the_size_of_a_batch_does_not_hang_on_the_other_batches_but_the_fullest():
  for events in ([5_000] * 999 + [10_000], [9_000] * 999 + [10_000], [10_000]):
    assert 5_000 <= slots(rooms(events), 5_000) < 5_000 / RATIO + 8


def test_no_room_is_larger_than_what_all_examples_can_fill():
  of = rooms([15_900, 16_000], limit=16_000)
  assert slots(of, 16_000) == capacity(16_000) == 16_384 < capacity(int(16_000 * 1.03))
  assert slots(rooms([13_000], limit=16_000), 15_000) <= 16_384
  with pytest.raises(ValueError, match=r"\{'h': 20000\} events, .* more than \{'h': 16384\}"):
    slots(of, 20_000)


def test_a_history_that_needs_less_than_others_has_less_in_steps_of_two_sizes():
  of = Rooms.measured([{"a": 10_000, "b": 500}], {"a": 10**6, "b": 10**6}, MARGIN)
  events = {"a": range(0, 10_000, 50), "b": (0, 90, 240, 350, 500)}
  size = lambda a, b: tuple(of.of({"a": a, "b": b}).values())
  sizes = set()
  for pair in itertools.product(*events.values()):
    room = size(*pair)
    wanted = [n / RATIO + 8 for n in pair]
    assert all(n <= r and (r == 64 or r < w / RATIO + 8) for n, r, w in zip(pair, room, wanted))
    # That which needs the most has no more than if it were alone.
    assert any(r == 64 or r < w for r, w in zip(room, wanted)) or room == size(10_000, 500)
    sizes.add(room)
  alone = [{size(a, 0)[0] for a in events["a"]}, {size(0, b)[1] for b in events["b"]}]
  assert len(alone[0]) < len(sizes) < np.prod([len(x) for x in alone])
  assert size(10, 500)[1] == size(10_000, 500)[1]
  assert size(10, 600)[1] > size(10, 500)[1]


def test_sequences_never_have_less_than_what_was_measured():
  of = rooms([10_000])
  size = lambda events: of.of({"h": events}, shrink=False)["h"]
  assert size(0) == size(10_000) == slots(of, 10_000)
  assert 20_000 <= size(20_000) == slots(of, 20_000)


def test_what_was_never_seen_has_the_least_room():
  of = rooms([0, 0])
  assert slots(of, 0) == slots(of, 64) == 64
  assert 5_000 <= slots(of, 5_000) < 5_000 / RATIO + 8
  assert Rooms.measured([], {}, MARGIN).of({}) == {}
