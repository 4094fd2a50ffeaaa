"""What is done to sequences as such, against lists of numpy arrays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequence_case import LENGTHS, SLOTS, events, split

from gemjax.layers import tokens as tokens_lib

EMPTY = (0,) * len(LENGTHS)
OTHER = (2, 0, 0, 4, 1, 3)
concat, pooled = jax.jit(tokens_lib.concat), jax.jit(tokens_lib.mean)
coarsen, last = (jax.jit(f, static_argnums=1) for f in (tokens_lib.coarsen, tokens_lib.last))


def tokens(lengths=LENGTHS, seed=0):
  x_ED, age_E = events(lengths, seed=seed)
  return jax.jit(tokens_lib.of_lengths)(x_ED, jnp.array(lengths, jnp.int32), age_E)


def lists(found):
  """[(x, age) of every example], by offsets alone."""
  ends = np.asarray(found.offsets_B1)
  x_ED, age_E = np.asarray(found.x_ED), np.asarray(found.age_E)
  return [(x_ED[a:b], age_E[a:b]) for a, b in itertools.pairwise(ends)]


def assert_lists(found, wanted, exact=True):
  assert found.offsets_B1.dtype == jnp.int32 and found.age_E.dtype == jnp.int32
  assert len(found.x_ED) == len(found.age_E) >= found.offsets_B1[-1]
  same = np.testing.assert_array_equal
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  for (x, age), (wanted_x, wanted_age) in zip(lists(found), wanted, strict=True):
    (same if exact else near)(x, wanted_x)
    same(age, wanted_age)


def test_of_lengths_and_segments():
  x_ED, age_E = events()
  assert_lists(tokens(), zip(split(x_ED), split(age_E)))
  owner = np.repeat([*range(6), 6], [*LENGTHS, SLOTS - sum(LENGTHS)])
  np.testing.assert_array_equal(tokens_lib.segment_E(tokens()), owner)
  np.testing.assert_array_equal(tokens_lib.segment_E(tokens(EMPTY)), np.full(SLOTS, 6))
  recency = np.concatenate([np.arange(n)[::-1] for n in LENGTHS])
  np.testing.assert_array_equal(tokens_lib.recency_E(tokens())[: sum(LENGTHS)], recency)


@pytest.mark.parametrize("first", [LENGTHS, OTHER, EMPTY])
@pytest.mark.parametrize("second", [LENGTHS, EMPTY])
def test_concat(first, second):
  a, b = tokens(first, 1), tokens(second, 2)
  both = concat(a, b)
  assert len(both.x_ED) == 2 * SLOTS
  wanted = [tuple(map(np.concatenate, zip(p, q))) for p, q in zip(lists(a), lists(b))]
  assert_lists(both, wanted)


def test_dense_tokens_in_front():
  x_BMD = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 8)), jnp.float32)
  found = tokens_lib.dense(x_BMD, age=7)
  assert_lists(found, [(x, [7, 7]) for x in np.asarray(x_BMD)])
  front = lists(concat(found, tokens()))
  np.testing.assert_array_equal(np.stack([x[:2] for x, _ in front]), x_BMD)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("lengths", [LENGTHS, OTHER, EMPTY, (24, 0, 0, 0, 0, 0), (4,) * 6])
def test_coarsen(lengths, stride):
  fine = tokens(lengths)
  coarse = coarsen(fine, stride)
  assert len(coarse.x_ED) == SLOTS // stride + len(lengths)
  wanted = []
  for x, age in lists(fine):
    ends = sorted(range(len(x), 0, -stride))
    groups = [x[max(0, end - stride) : end].mean(0) for end in ends]
    wanted.append((np.reshape(groups, (-1, 8)), [age[end - 1] for end in ends]))
  assert_lists(coarse, wanted, exact=False)


def test_the_gradient_of_a_group_goes_to_its_events_in_equal_shares():
  fine = tokens((9, 0, 2, 0, 0, 4))
  total = lambda x_ED: coarsen(fine._replace(x_ED=x_ED), 4).x_ED[:, 0].sum()
  share = [1] + 8 * [1 / 4] + 2 * [1 / 2] + 4 * [1 / 4] + 9 * [0]
  np.testing.assert_allclose(jax.jit(jax.grad(total))(fine.x_ED)[:, 0], share, rtol=1e-6)


def test_pooling():
  found = pooled(tokens()), last(tokens(), 4)
  for b, (x, _) in enumerate(lists(tokens())):
    mean = x.mean(0) if len(x) else np.zeros(8)
    np.testing.assert_allclose(found[0][b], mean, rtol=1e-6, atol=1e-6)
    newest = np.concatenate([np.zeros((4, 8), np.float32), x])[-4:]
    np.testing.assert_array_equal(found[1][b], newest)
  assert not pooled(tokens(EMPTY)).any() and not last(tokens(EMPTY), 2).any()


def test_spread_and_total_are_transposed():
  x_BD = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
  y_ED, pull = jax.vjp(jax.jit(lambda x: tokens_lib.spread(x, tokens())), x_BD)
  wanted = np.repeat(x_BD, LENGTHS, axis=0)
  np.testing.assert_array_equal(y_ED[: sum(LENGTHS)], wanted)
  assert not y_ED[sum(LENGTHS) :].any()
  total = tokens_lib.total(tokens())
  np.testing.assert_array_equal(pull(tokens().x_ED)[0], total)
  np.testing.assert_allclose(total, [x.sum(0) for x, _ in lists(tokens())], rtol=1e-5, atol=1e-6)


def test_keys_follow_the_example_and_the_recency_alone():
  key_B = jax.random.split(jax.random.key(0), 6)
  data = lambda keys: jax.random.key_data(keys)[: sum(LENGTHS)]
  here = data(tokens_lib.event_keys(key_B, tokens()))
  assert len(np.unique(here, axis=0)) == sum(LENGTHS)
  # The example of 9 events with its newest 4 alone, last of another batch.
  order = jnp.array([4, 5, 0, 1, 3, 2])
  there = data(tokens_lib.event_keys(key_B[order], tokens((1, 0, 0, 0, 6, 4))))
  np.testing.assert_array_equal(here[8:12], there[7:11])
  assert tokens_lib.event_keys(None, tokens()) is None
