"""The feed: what it hands on, and what it tells the log of slots."""

import itertools

import jax
import numpy as np
import pytest

from gemjax.features import Batch, Events, Jagged
from gemjax.parallel.mesh import make_mesh
from gemjax.train.feed import Feed

SHARDS = 2


def batch(rng, room: int, values: int) -> Batch:
  """Four examples in two shards of `room` event slots, three of them used."""
  ids_NEC = np.zeros((SHARDS, room, 2), np.int32)
  age_NE = np.zeros((SHARDS, room), np.int32)
  ids_NEC[0, :2], age_NE[0, :2] = rng.integers(2, 9, (2, 2)), [5, 4]
  ids_NEC[1, :1], age_NE[1, :1] = rng.integers(2, 9, (1, 2)), [7]
  lengths_B = np.array([2, 0, 0, 1], np.int32)
  values_E = np.arange(1, 1 + SHARDS * values, dtype=np.int32)
  jagged = Jagged(values_E, np.full(4, values // 2, np.int32))
  return Batch(
    dense_BF=rng.random((4, 1), np.float32),
    ids_BS=np.zeros((4, 0), np.int32),
    label_BT=np.zeros((4, 1), np.float32),
    weight_B=np.ones(4, np.float32),
    group_B=np.zeros(4, np.int32),
    oracle_BT=np.zeros((4, 0), np.float32),
    sequences={"s": jagged},
    histories={"h": Events(ids_NEC.reshape(-1, 2), age_NE.reshape(-1), lengths_B)},
  )


class Stream:
  """Batches with a position."""

  def __init__(self, batches):
    self.batches, self.next = batches, 0

  def __next__(self):
    self.next += 1
    return self.batches[self.next - 1]

  def get_state(self):
    return self.next

  def set_state(self, state):
    self.next = state


@pytest.fixture
def made():
  rng = np.random.default_rng(0)
  rooms = [(8, 4), (16, 4), (8, 8), (16, 8)]
  return [batch(rng, *room) for room in rooms]


def feed(made):
  return Feed(Stream(made), make_mesh(1, SHARDS))


def test_a_batch_arrives_as_it_was_read(made):
  out = feed(made)
  for pair in itertools.pairwise(made):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(out.advance()), pair)


def test_where_the_batch_behind_cannot_be_read_nothing_has_changed(made):
  stream = Stream(made[:2])
  out = Feed(stream, make_mesh(1, SHARDS))
  out.advance()
  for _ in range(2):
    with pytest.raises(IndexError):
      out.advance()
    assert out.get_state() == 1
  stream.batches, stream.next = made, 2
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(out.advance()), tuple(made[1:3]))


def test_padding_for_the_log(made):
  out = feed(made)
  assert out.padding() == 0
  for _ in made[1:]:
    out.advance()
  assert out.padding() == pytest.approx(1 - 4 * 3 / (2 * (8 + 16 + 8 + 16)))
  assert out.padding() == 0  # Since the last call.
